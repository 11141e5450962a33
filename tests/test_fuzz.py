"""Broken input, a thousand times: files that `rr` reads are damaged at random, command lines are drawn at random.

Whatever happens, there is no traceback and no hang: a command ends with exit code 0 (the damage did not matter), 1, 2
or 3, with one `error:` line where it failed, and what was published stays as it was.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import rr
from comparing import four_stages, publish

pytestmark = pytest.mark.slow

SEED = 20
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 10**30, -0.5, 1e308, 2**63, "", "x", "\x1b[31mred", "[bold]b[/bold]", "../../etc"),
    *([], {}, [[]], [None], {"": None}, [1, 2], ["a"], {"a": {"b": []}}, "\ud800", "a" * 10_000),
)


# -- damage ------------------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a JSON value; of long lists, the first few."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def damage_json(text: str, draw: random.Random) -> str:
    """Replace, drop, double or rename a value somewhere in a JSON text."""
    value = json.loads(text)
    *parents, last = draw.choice(places(value))
    inner = value
    for key in parents:
        inner = inner[key]
    how = draw.randrange(4)
    if how == 0:
        del inner[last]
    elif how == 1 and isinstance(inner, list):
        inner.append(inner[last])
    elif how == 1:
        inner[f"{last}_"] = inner.pop(last)
    else:
        inner[last] = draw.choice(VALUES)
    return json.dumps(value)


def damage_bytes(raw: bytes, draw: random.Random) -> bytes:
    """Cut a file off, or change, insert or drop some of its bytes."""
    where, how = draw.randrange(len(raw) + 1), draw.randrange(5)
    noise = bytes(draw.randrange(256) for _ in range(draw.randint(1, 8)))
    if how == 0:
        return raw[:where]
    if how == 1:
        return raw[:where] + noise + raw[where:]
    if how == 2:
        return raw[:where] + noise + raw[where + len(noise) :]
    if how == 3:
        return raw[:where] + raw[where + draw.randint(1, 64) :]
    return b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n")


def damage(file: Path, draw: random.Random) -> None:
    """Damage one file; of a file of JSON lines, one line."""
    raw = file.read_bytes()
    if file.suffix in (".json", ".jsonl") and draw.random() < 0.75:
        lines = raw.decode().splitlines() if file.suffix == ".jsonl" else [raw.decode()]
        number = draw.randrange(len(lines))
        lines[number] = damage_json(lines[number], draw)
        raw = "\n".join([*lines, ""]).encode("utf-8", "surrogatepass")
    else:
        raw = damage_bytes(raw, draw)
    file.write_bytes(raw)


def contents(folder: Path) -> dict[str, str]:
    """Return a hash of every file that was published: results and checkpoints."""
    files = [file for name in ("eval_results", "checkpoints") for file in (folder / name).rglob("*") if file.is_file()]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if not file.name.endswith(("_samples.jsonl", ".bak"))
    }


def holds(folder: Path, arguments: tuple[str, ...], what: str) -> int:
    """Run a command, look at how it ends, and return its exit code."""
    before = contents(folder)
    done = rr(*arguments, folder=folder)
    told = f"{what}: rr {' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert done.returncode in (0, 1, 2, 3), told
    assert "Traceback" not in done.stderr, told
    assert not set(done.stderr) & set(map(chr, [*range(9), *range(11, 32), 127])), f"control characters: {told}"
    if done.returncode:
        assert "error:" in done.stderr or "Usage:" in done.stderr, told
        assert contents(folder) == before, f"something changed on disk: {told}"
    return int(done.returncode)


def mutate(
    made: Path, folder: Path, file: str, commands: list[tuple[str, ...]], count: int, seed: str
) -> dict[int, int]:
    """Damage a file `count` times, each time in a fresh copy of `made`, and run a command; return exit codes.

    Without damage every command succeeds: what fails, fails because of it.
    """
    codes: dict[int, int] = {}
    for command in commands:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made, folder)
        assert holds(folder, command, "no damage") == 0, command
    for number in range(count):
        draw = random.Random(f"{SEED}/{seed}/{number}")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made, folder)
        damage(next(folder.glob(file)), draw)
        code = holds(folder, draw.choice(commands), f"{file}, mutation {number}")
        codes[code] = codes.get(code, 0) + 1
    print(f"{file}: {count} mutations, exit codes {dict(sorted(codes.items()))}")
    return codes


# -- what is damaged ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of four stages."""
    folder = tmp_path_factory.mktemp("compared")
    stages = four_stages()
    for stage in stages:
        harness = [
            {"key": f"h{i}", "task": "t", "metric": "acc", "score": float(i % 2), "target": "x", "output": ""}
            for i in range(20)
        ]
        stage["records"]["harness"] = harness
        stage["metrics"]["harness/t/acc"] = {"value": 0.5, "low": 0.3, "high": 0.7, "n": 20, "better": "higher"}
        stage["metrics"] |= {"stability@1": {"value": 0.9}, "decode/stability@1": {"value": 0.9}}
    publish(folder, *stages)
    return folder


COMPARE = [
    ("compare",),
    ("compare", "--json"),
    ("compare", "--format", "csv"),
    ("compare", "--format", "markdown", "--generations"),
    ("compare", "--report", "report.html"),
    ("compare", "--gate", "finetuned_vanilla.perplexity < baseline.perplexity", "--gate-significant"),
    ("status",),
    ("compare", "baseline", "finetuned_recursive"),
]


@pytest.mark.parametrize("stage", ["baseline", "after_surgery", "finetuned_vanilla", "finetuned_recursive"])
def test_results(compared: Path, tmp_path: Path, stage: str) -> None:
    mutate(compared, tmp_path / "work", f"eval_results/{stage}_results.json", COMPARE, 100, stage)


def quick(folder: Path, *arguments: str) -> None:
    done = rr(*arguments, folder=folder)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small experiment on a model, a text, problems and prompts of its own; its last evaluation was cut off."""
    from rrcli import demo

    folder = tmp_path_factory.mktemp("experiment")
    shutil.copytree(demo.MODEL_DIR, folder / "model")
    text = demo.TEXT_FILE.read_text(encoding="utf-8").splitlines()[:150]
    (folder / "text.jsonl").write_text("\n".join([*text, ""]), encoding="utf-8")
    problems = [json.dumps({"question": f"What is {i} + 1?", "answer": str(i + 1)}) for i in range(60)]
    (folder / "problems.jsonl").write_text("\n".join([*problems, ""]))
    (folder / "prompts.jsonl").write_text('{"prompt": "Once"}\n{"prompt": "Tom has"}\n')
    common = ("--model", "model", "--data", "text.jsonl", "--task", "problems.jsonl")
    quick(folder, "setup", *common)
    quick(folder, "surgery")
    quick(folder, *TRAIN)
    shutil.rmtree(folder / "checkpoints" / "finetuned_recursive" / "step-000003")  # so that it has a step to go
    quick(folder, *EVAL)
    log = folder / "eval_results" / "baseline_samples.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines()
    log.write_text("\n".join([*lines[: len(lines) * 2 // 3], ""]), encoding="utf-8")
    return folder


TRAIN = (
    *("train", "--mode", "recursive", "--steps", "3", "--batch-size", "2", "--eval-interval", "0"),
    *("--save-interval", "1", "--keep", "3", "--max-length", "32"),
)
EVAL = (
    *("eval", "--stage", "baseline", "--problems", "3", "--max-new-tokens", "4", "--max-samples", "4"),
    *("--prompts", "prompts.jsonl", "--skip-performance", "--no-tensorboard"),
)
GENERATE = ("generate", "Once upon", "--max-new-tokens", "3")
LEARN = (*TRAIN, "--restart")
AFTER_SURGERY = (*GENERATE, "--stage", "after_surgery")
LOOK = [("status",), ("run", "--dry-run"), ("status", "--json")]
STEP = "checkpoints/finetuned_recursive/step-000002"


@pytest.mark.parametrize(
    ("file", "commands", "count"),
    [
        ("rr.toml", [*LOOK, ("compare",), EVAL], 60),
        ("eval_results/baseline_samples.jsonl", [EVAL], 60),
        ("checkpoints/after_surgery/recursion.json", [*LOOK, AFTER_SURGERY, TRAIN], 30),
        ("checkpoints/after_surgery/recursion.safetensors", [AFTER_SURGERY], 15),
        (f"{STEP}/recursion.json", [*LOOK, GENERATE, TRAIN], 30),
        (f"{STEP}/metrics.json", [*LOOK, TRAIN], 40),
        (f"{STEP}/trainer_state/progress.json", [TRAIN], 30),
        (f"{STEP}/trainer_state/optimizer.safetensors", [TRAIN], 15),
        (f"{STEP}/model.safetensors", [GENERATE], 15),
        ("model/config.json", [EVAL, GENERATE, LOOK[0]], 40),
        ("model/tokenizer.json", [EVAL], 63),
        ("model/tokenizer_config.json", [EVAL], 30),
        ("model/generation_config.json", [EVAL], 30),
        ("model/model.safetensors", [EVAL, LOOK[1]], 20),
        ("text.jsonl", [EVAL, LEARN], 40),
        ("problems.jsonl", [EVAL, LEARN], 30),
        ("prompts.jsonl", [EVAL], 20),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_an_experiment(
    experiment: Path, tmp_path: Path, file: str, commands: list[tuple[str, ...]], count: int
) -> None:
    mutate(experiment, tmp_path / "work", file, commands, count, file)


def command_line(draw: random.Random) -> tuple[str, ...]:
    words = [
        *("setup", "surgery", "train", "eval", "compare", "generate", "board", "run", "status", "--json", "--stage"),
        *("--steps", "--max-steps", "--depth", "--span", "--gate", "--task", "--harness", "--model", "--data", "--out"),
        *("--phase", "--mode", "--seed", "--alpha", "--stop", "--dir", "--device", "--dtype", "--check", "--dry-run"),
        *("baseline", "nothing", "-1", "0", "1e9", "nan", "", " ", "\x1b[31m", "[red]", "a.b > c", "../..", "2:1", "-"),
        *("chain_sum:min_terms=x", "=", "default", "--no-", "--", "ü", "missing.jsonl", "hf://", "cpu:99"),
    ]
    return tuple(draw.choice(words) for _ in range(draw.randint(1, 5)))


def test_command_lines(compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: Callable[..., Any] = lambda *_, **__: pytest.fail("it would do real work")  # noqa: E731
    for name in ("evaluate_model",):
        monkeypatch.setattr(f"rrcli.evaluation.evaluate.{name}", waits)
    codes: dict[int, int] = {}
    for number in range(100):
        draw = random.Random(f"{SEED}/line/{number}")
        line = command_line(draw)
        if line[0] in ("board", "run", "train", "eval", "setup", "surgery", "generate"):
            line = (*line, "--no-such-option")  # it is parsed, and goes no further
        folder = tmp_path / "work"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(compared, folder)
        code = holds(folder, line, f"command line {number}")
        codes[code] = codes.get(code, 0) + 1
    print(f"command lines: 100, exit codes {dict(sorted(codes.items()))}")
