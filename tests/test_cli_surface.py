"""The command line from outside: its options, exit codes, streams, and what it says when it is misspelled."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from comparing import stage_results
from rrcli import __version__
from rrcli.cli.commands import app
from rrcli.demo import defaults
from rrcli.errors import RRError
from rrcli.experiment.planning import Step
from rrcli.files import write_json
from rrcli.settings import PERFORMED, SECTIONS, STAGES, CommonSettings, own_fields

ESCAPE = "\x1b"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands set a signal handler, `--debug` a variable: leave neither behind."""
    for name in [name for name in os.environ if name.startswith("RR_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RR_DEBUG", "")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def rr(*arguments: Any, directory: Path | None = None) -> Any:
    where = ["--dir", str(directory)] if directory else []
    return CliRunner().invoke(app, [*map(str, arguments), *where])


def plain(text: str) -> str:
    """Return text without the frame that help and usage errors are drawn in."""
    return re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", text))


# -- the options -------------------------------------------------------------------------------------------------------

EVERYWHERE = {"--dir", "--debug", "--json"}
MODEL = {"--model", "--model-path", "--model-name", "--trust-remote-code", "--no-trust-remote-code"}
LOADING = MODEL | {
    "--device",
    "--dtype",
    "--quantize",
    "--parallel",
    "--device-map",
    "--max-memory",
    "--seed",
    "--checkpoint-dir",
}
DATA = {"--data", "--eval-data", "--text-field", "--on-bad-row", "--task", "--template-date"}
LOGS = {"--log-dir", "--output-dir"}
COMMON = LOADING | DATA | LOGS | {"--tracker", "--seeds", "--equal-flops", "--no-equal-flops"}
SURGERY = {"--span", "--max-steps", "--cell-width", "--relative-feedback", "--no-relative-feedback", "--chunk-width"}
TRAIN = (
    {"--phase", "--steps", "--batch-size", "--gradient-accumulation", "--lr", "--sidecar-lr", "--warmup-steps"}
    | {"--packing", "--no-packing", "--chat-template", "--no-chat-template"}
    | {"--weight-decay", "--max-grad-norm", "--task-share"}
    | {"--schedule", "--ema", "--gradient-checkpointing", "--no-gradient-checkpointing"}
    | {"--histograms", "--callback", "--num-processes", "--compile", "--no-compile"}
    | {"--eval-interval", "--eval-samples", "--save-interval", "--keep", "--load-best", "--no-load-best"}
    | {"--final-weight", "--masked-weight", "--halt-weight", "--ponder-weight", "--stability-weight"}
    | {"--supervised-share", "--commit-margin", "--lora-rank", "--lora-alpha"}
    | {"--lora-experts", "--no-lora-experts"}
)
EVAL = (
    {"--stride", "--max-samples", "--problems", "--max-new-tokens", "--batch-tokens", "--depth", "--exit"}
    | {"--exit-loss", "--num-fewshot", "--stop", "--prompts", "--harness", "--samples", "--temperature"}
    | {"--chat-template", "--no-chat-template", "--tensorboard", "--no-tensorboard", "--num-processes"}
    | {f"--{no}skip-{part}" for no in ("", "no-") for part in ("perplexity", "reasoning", "generation", "performance")}
)
EXPORTING = {"--trust-remote-code", "--no-trust-remote-code", "--seed", "--checkpoint-dir", "--output-dir"}
COMPARE = {"--primary", "--margin", "--alpha", "--gate", "--gate-significant", "--no-gate-significant"}
OWN = {
    "setup": COMMON | {"--overwrite"},
    "surgery": LOADING | SURGERY | {"--overwrite", "--dry-run", "--verify", "--no-verify", "--hash", "--export"},
    "train": LOADING
    | DATA
    | TRAIN
    | {"--log-dir", "--tracker", "--mode", "--restart", "--match-flops", "--run-name", "--max-length", "--max-steps"}
    | {"--chunk-width"},
    "eval": LOADING
    | DATA
    | LOGS
    | EVAL
    | {"--tracker", "--stage", "--use-recursive", "--no-use-recursive", "--max-length", "--exits", "--no-exits"}
    | {"--choose-exit", "--no-choose-exit"},
    "costs": LOADING | DATA - {"--task"} | LOGS | {"--rounds", "--tracker"},
    "plan": MODEL
    | (SURGERY - {"--relative-feedback", "--no-relative-feedback"})
    | {
        "--data",
        "--eval-data",
        "--text-field",
        "--task",
        "--dtype",
        "--quantize",
        "--seed",
        "--seeds",
        "--equal-flops",
        "--no-equal-flops",
    }
    | {"--gpus", "--device", "--context", "--rows", "--efficiency", "--phase", "--steps", "--batch-size"}
    | {"--train-max-length", "--train-max-steps", "--lora-rank", "--ema", "--gradient-accumulation"}
    | {"--lora-experts", "--no-lora-experts"}
    | {"--gradient-checkpointing", "--no-gradient-checkpointing", "--packing", "--no-packing", "--task-share"}
    | {"--supervised-share", "--eval-interval", "--eval-samples", "--problems", "--max-samples", "--eval-max-length"}
    | {"--max-new-tokens", "--batch-tokens", "--samples"}
    | {f"--{no}skip-{part}" for no in ("", "no-") for part in ("perplexity", "reasoning", "performance")},
    "compare": COMPARE
    | {"--log-dir", "--output-dir", "--generations", "--no-generations", "--format", "--out", "--report"},
    "generate": LOADING
    | {"--stage", "--trace", "--max-new-tokens", "--temperature", "--top-p", "--top-k", "--depth"}
    | {"--chunk-width", "--stop", "--exit"},
    "board": {"--log-dir", "--check", "--port", "--host", "--reload-interval", "--open", "--no-open"},
    "run": COMMON
    | SURGERY
    | TRAIN
    | EVAL
    | COMPARE
    | {
        "--rounds",
        "--dry-run",
        "--slurm",
        "--launcher",
        "--train-max-length",
        "--eval-max-length",
        "--train-max-steps",
        "--train-chunk-width",
    },
    "export": EXPORTING | {"--merge", "--overwrite"},
    "push": EXPORTING | {"--merge", "--overwrite", "--public"},
    "serve": EXPORTING - {"--output-dir"} | {"--device", "--dtype", "--port"},
    "status": {"--checkpoint-dir", "--output-dir"},
}
SURFACE = {name: options | EVERYWHERE for name, options in OWN.items()}


def commands() -> dict[str, Any]:
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_the_commands_are_these() -> None:
    assert set(commands()) == set(SURFACE)


@pytest.mark.parametrize("name", SURFACE)
def test_the_options_are_these(name: str) -> None:
    options = [
        text for p in commands()[name].params for text in (*p.opts, *p.secondary_opts) if p.param_type_name == "option"
    ]
    assert set(options) == SURFACE[name]
    assert len(options) == len(set(options))


def test_what_is_given_by_position() -> None:
    arguments = [p.name for c in commands().values() for p in c.params if p.param_type_name == "argument"]
    assert arguments == ["stages", "stages", "prompt", "name", "folder", "name", "name", "repo"]


@pytest.mark.parametrize("name", SURFACE)
def test_every_command_and_option_has_help(name: str) -> None:
    command = commands()[name]
    assert command.help
    for option in command.params:
        assert getattr(option, "help", None), f"{name} {option.opts}"
    shown = rr(name, "--help")
    assert shown.exit_code == 0
    assert "Traceback" not in shown.output


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("name", SURFACE)
def test_help_can_be_read_at_any_width(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    shown = rr(name, "--help").stdout
    assert "…" not in shown, "an option's name is cut off"
    assert max(map(len, shown.splitlines())) <= width
    assert ESCAPE not in shown
    panels = re.findall(r"╭─ (.+?) ─", shown)
    assert panels[-2:] == ["Files and folders", "Output"]
    assert next(panel for panel in panels if panel != "Arguments") == "Options"


def test_help_shows_one_spelling_of_an_option_and_every_other_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shown = plain(rr("run", "--help").stdout)
    assert "--model <str>" in shown
    assert "--no-chat-template Do not format" in shown
    assert "--packing Pack" in shown
    for hidden in ("--model-path", "--model-name", "--no-compile", " --chat-template"):
        assert hidden not in shown
    for name in ("--model", "--model-path", "--model-name"):
        failed = rr("run", "--dry-run", name, "./nowhere", directory=tmp_path)
        assert (failed.exit_code, "nowhere does not exist" in failed.stderr) == (2, True)


def test_the_help_of_an_option_with_choices_names_them() -> None:
    for cls in SECTIONS:
        for item in own_fields(cls):
            for choice in item.metadata["choices"]:
                assert re.search(rf"\b{choice}\b", item.metadata["help"]), f"{item.name} does not explain {choice}"


def test_help_shows_every_command() -> None:
    for flag in ("--help", "-h"):
        shown = rr(flag)
        assert shown.exit_code == 0
        assert all(name in shown.stdout for name in SURFACE)
    assert all(name in rr().output for name in SURFACE)


def test_version() -> None:
    shown = rr("--version")
    assert (shown.exit_code, shown.stdout) == (0, f"rr {__version__}\n")


# -- rr run: the options of the stages that it performs ----------------------------------------------------------------


def planned(directory: Path, *arguments: Any) -> list[str]:
    shown = rr("run", "--dry-run", "--json", *arguments, directory=directory)
    assert shown.exit_code == 0, shown.stderr
    return [step["status"] for step in json.loads(shown.stdout)["steps"]]


def test_an_option_of_several_stages_is_alike_in_all_of_them() -> None:
    """One flag of `rr run` sets them all."""
    found: dict[str, list[Any]] = {}
    for cls in PERFORMED:
        for item in own_fields(cls):
            name = item.metadata["in_run"] if item.metadata["in_run"] != "" else item.name
            if name is not None:
                found.setdefault(name, []).append(item)
    joined = {name: items for name, items in found.items() if len(items) > 1}
    assert set(joined) == {"chat_template", "num_processes"}
    for items in joined.values():
        assert len({(item.type, item.default, item.metadata["choices"]) for item in items}) == 1
    assert not found.keys() & {item.name for item in own_fields(CommonSettings)}


def test_options_given_to_run_reach_the_settings_file_each_in_its_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rrcli.services import run as service
    from rrcli.services import setup

    def first_step_alone(*_: Any, perform: Any, **__: Any) -> None:
        perform(Step("setup", None, "missing"))
        raise RRError("stopped by the test")

    monkeypatch.setattr(service, "run", first_step_alone)
    monkeypatch.setattr(setup, "_self_test", lambda _: "left out")
    given = [
        *("--steps", 50, "--max-steps", 1, "--train-max-length", 99, "--eval-max-length", 77, "--no-chat-template"),
        *("--gate", "1 > 0", "--seed", 3, "--stop", "END"),
    ]
    assert "stopped by the test" in rr("run", *given, directory=tmp_path).stderr
    written = tomllib.loads((tmp_path / "rr.toml").read_text())
    assert (written["common"]["seed"], written["surgery"]["max_steps"], written["surgery"]["chunk_width"]) == (3, 1, 16)
    assert (written["train"]["steps"], written["train"]["max_steps"], written["train"]["max_length"]) == (50, 0, 99)
    assert written["train"]["batch_size"] == defaults.SETTINGS["train"]["batch_size"]
    assert (written["eval"]["max_length"], written["eval"]["stop"]) == (77, ["END"])
    assert [written[section]["chat_template"] for section in ("train", "eval")] == [False, False]
    assert written["compare"]["gate"] == ["1 > 0"]

    rr("run", "--train-max-steps", 1, directory=tmp_path)
    again = tomllib.loads((tmp_path / "rr.toml").read_text())
    written["train"]["max_steps"] = 1
    assert again == written


def test_a_plan_with_given_options_begins_with_writing_them(tmp_path: Path) -> None:
    (tmp_path / "rr.toml").write_text("")
    assert planned(tmp_path)[0] == "done"
    assert planned(tmp_path, "--steps", 5)[0] == "stale"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-max-length", 3], "--train-max-length is 3"),
        (["--eval-max-length", -1], "--eval-max-length is -1"),
        (["--max-steps", 9], "--max-steps is 9"),
        (["--train-max-steps", -1], "--train-max-steps is -1"),
        (["--alpha", 2], "--alpha is 2"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_run_refuses_every_stages_options_before_it_starts_and_names_them_as_written(
    tmp_path: Path, arguments: list[Any], message: str
) -> None:
    failed = rr("run", *arguments, directory=tmp_path)
    assert failed.exit_code == 2
    assert message in failed.stderr
    assert list(tmp_path.iterdir()) == []


# -- misspelled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["trian"], "'train'"),
        (["comapre", "baseline"], "'compare'"),
        (["train", "--stps", "3"], "--steps"),
        (["eval", "--stge", "baseline"], "--stage"),
        (["eval", "--stage", "basline"], "'baseline'"),
        (["eval", "--stage", "finetuned-recursive"], "'finetuned_recursive'"),
        (["compare", "basline"], "'baseline'"),
        (["surgery", "--dtype", "float23"], "'float32'"),
        (["train", "--mode", "foo"], "vanilla, recursive"),
        (["setup", "--seed", "-1"], "at least 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_typo_is_a_usage_error_with_a_suggestion(tmp_path: Path, arguments: list[str], suggestion: str) -> None:
    failed = rr(*arguments, directory=tmp_path)
    assert failed.exit_code == 2
    assert suggestion in plain(failed.stderr)
    assert failed.stdout == ""
    assert "Traceback" not in failed.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_typo_in_the_settings_file_stops_every_command(tmp_path: Path) -> None:
    (tmp_path / "rr.toml").write_text("[train]\nstesp = 3\n")
    for arguments in (["run", "--dry-run"], ["compare"], ["board"], ["train"], ["setup"]):
        failed = rr(*arguments, directory=tmp_path)
        assert failed.exit_code == 2
        assert "unknown key 'stesp'" in failed.stderr
        assert "hint: Did you mean 'steps'?" in failed.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--steps", "many"],
        ["train", "--steps", "0"],
        ["train", "--gradient-accumulation"],
        ["compare", "--alpha", "x"],
        ["board", "extra"],
    ],
    ids=" ".join,
)
def test_values_that_cannot_be_are_usage_errors(tmp_path: Path, arguments: list[str]) -> None:
    failed = rr(*arguments, directory=tmp_path)
    assert failed.exit_code == 2
    assert failed.stderr
    assert failed.stdout == ""


@pytest.mark.parametrize("arguments", [["run"], ["run", "--dry-run"], ["setup"]], ids=" ".join)
def test_standard_input_is_refused_where_several_stages_need_it(tmp_path: Path, arguments: list[str]) -> None:
    failed = rr(*arguments, "--data", "-", directory=tmp_path)
    assert failed.exit_code == 2
    assert "standard input" in failed.stderr
    assert "hint: Write it to a file first" in failed.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    failed = rr("compare", directory=tmp_path / "absent")
    assert failed.exit_code == 2
    assert "absent does not exist" in failed.stderr
    assert rr("run", "--dry-run", directory=tmp_path / "absent").exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_writes_makes_its_directory(tmp_path: Path) -> None:
    done = rr("setup", directory=tmp_path / "new" / "experiment")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "new" / "experiment" / "rr.toml").is_file()
    (tmp_path / "file").touch()
    failed = rr("run", directory=tmp_path / "file")
    assert failed.exit_code == 1
    assert "is a file, a folder was expected" in failed.stderr


# -- what is missing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["eval", "--stage", "after_surgery"], "rr surgery"),
        (["eval", "--stage", "finetuned_vanilla"], "rr train --mode vanilla"),
        (["eval", "--stage", "finetuned_recursive"], "rr train --mode recursive"),
        (["train", "--mode", "recursive"], "rr surgery"),
        (["board"], "rr eval --stage baseline"),
        (["compare"], "rr run"),
        (["compare", "baseline"], "rr eval --stage baseline"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_missing_is_an_error_that_names_the_command(tmp_path: Path, arguments: list[str], named: str) -> None:
    failed = rr(*arguments, directory=tmp_path)
    assert failed.exit_code == 1
    assert re.search(r"^error: ", failed.stderr, re.MULTILINE)
    hint = re.search(r"^hint: (.*)$", failed.stderr, re.MULTILINE)
    assert hint
    assert named in hint.group(1)
    assert failed.stdout == ""


def test_json_is_not_printed_when_a_command_fails(tmp_path: Path) -> None:
    failed = rr("compare", "--json", directory=tmp_path)
    assert (failed.exit_code, failed.stdout) == (1, "")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    failed = rr("compare", "--debug", directory=tmp_path)
    assert failed.exit_code == 1
    assert type(failed.exception).__name__ == "RRError"


def test_the_hint_for_a_broken_settings_file_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rr.toml").write_text("[train\n")
    failed = rr("compare", directory=tmp_path)
    assert "rr setup --overwrite" in failed.stderr
    from rrcli.services import setup as service

    def stub(settings: Any, directory: Path, *_: Any, **__: Any) -> Any:
        return service.SetupResult([], directory / "rr.toml")

    monkeypatch.setattr(service, "setup", stub)
    assert rr("setup", "--overwrite", directory=tmp_path).exit_code == 0


def test_a_run_cannot_take_the_place_of_surgery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rrcli.services import train as service

    def stop(*_: Any, **__: Any) -> None:
        raise RRError("stopped by the test")

    monkeypatch.setattr(service, "load_for", stop)
    kept = tmp_path / "checkpoints" / "after_surgery" / "recursion.safetensors"
    kept.parent.mkdir(parents=True)
    kept.touch()
    rr("train", "--mode", "vanilla", "--run-name", "after_surgery", "--restart", directory=tmp_path)
    assert kept.exists()


# -- results and streams -----------------------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    for stage, better in zip(STAGES, (0.0, 0.0, 0.1, 0.2, 0.1), strict=True):
        file = tmp_path / "eval_results" / f"{stage}_results.json"
        write_json(file, stage_results(stage, better))
    return tmp_path


def test_compare_shows_a_table_and_says_what_it_means(measured: Path) -> None:
    shown = rr("compare", directory=measured)
    assert shown.exit_code == 0
    assert all(stage in shown.stdout for stage in STAGES)
    perplexity = next(line for line in shown.stdout.splitlines() if "Perplexity" in line)
    assert "7.37" in perplexity
    assert "Surgery preserved the baseline exactly" in shown.stdout
    assert "better" in shown.stdout
    assert re.search(r"\[7\.3\d, 7\.\d+\]", shown.stdout), "the first stage has its interval in brackets"
    assert shown.stderr == ""


@pytest.mark.parametrize("arguments", [["compare"], ["compare", "baseline", "finetuned_vanilla"], ["run", "--dry-run"]])
def test_json_is_one_object_with_a_schema_alone_on_stdout(measured: Path, arguments: list[str]) -> None:
    shown = rr(*arguments, "--json", directory=measured)
    assert shown.exit_code == 0

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    value = json.loads(shown.stdout, parse_constant=no_constant)
    assert re.fullmatch(r"rr\.\w+/\d", value["schema"])
    assert shown.stdout.count("\n") == 1
    if arguments[0] == "compare":
        assert value["stages"] == (arguments[1:] or list(STAGES))
        assert {row["name"] for row in value["rows"]} == {"perplexity", "bits_per_byte", "token_accuracy"}


def test_a_dry_run_plans_every_step_and_writes_nothing(tmp_path: Path) -> None:
    shown = rr("run", "--dry-run", "--json", directory=tmp_path)
    steps = json.loads(shown.stdout)["steps"]
    assert [step["command"] for step in steps] == [
        "rr setup",
        "rr eval --stage baseline",
        "rr surgery",
        "rr eval --stage after_surgery",
        "rr train --mode vanilla",
        "rr eval --stage finetuned_vanilla",
        "rr train --mode recursive",
        "rr eval --stage finetuned_recursive --choose-exit",
        "rr eval --stage finetuned_recursive",
        "rr costs",
    ]
    assert {step["status"] for step in steps} == {"missing"}
    more = json.loads(rr("run", "--dry-run", "--json", "--equal-flops", directory=tmp_path).stdout)["steps"]
    assert [step["command"] for step in more[len(steps) - 1 :]] == [
        "rr train --mode vanilla --match-flops finetuned_recursive",
        "rr eval --stage vanilla_equal_flops",
        "rr costs",
    ]
    assert {"kind": "train", "stage": "vanilla_equal_flops", "seed": 0}.items() <= more[-3].items()
    assert list(tmp_path.iterdir()) == []


def test_an_experiment_in_phase_a_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    for arguments in (("run", "--phase", "a"), ("run", "--phase", "a", "--dry-run")):
        refused = rr(*arguments, directory=tmp_path)
        assert refused.exit_code == 2
        assert "vanilla training would have nothing to train" in refused.stderr
        assert "rr train --mode recursive --phase a" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_warnings_stand_apart_from_sentences(measured: Path) -> None:
    file = measured / "eval_results" / "finetuned_vanilla_results.json"
    value = json.loads(file.read_text())
    value["provenance"]["seed"] = 5
    write_json(file, value)
    shown = rr("compare", directory=measured)
    assert "warning: baseline and finetuned_vanilla were measured with different seed (0 and 5)" in shown.output


def test_names_with_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    failed = rr("eval", "--stage", "[bold]x[/bold]", directory=tmp_path)
    assert "'[bold]x[/bold]'" in failed.stderr


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}, {"TERM": "xterm-256color"}], ids=str)
def test_a_pipe_gets_no_escape_codes(measured: Path, variables: dict[str, str]) -> None:
    for arguments in (["compare"], ["compare", "basline"]):
        done = subprocess.run(
            [sys.executable, "-m", "rrcli", *arguments],
            cwd=measured,
            env={key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "COLUMNS")} | variables,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert ESCAPE not in done.stdout + done.stderr
        assert done.stdout or done.stderr


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
@pytest.mark.parametrize("no_color", [True, False])
def test_a_terminal_gets_colour_unless_it_is_unwanted(measured: Path, no_color: bool) -> None:
    controller, terminal = os.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "CI", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "150"} | ({"NO_COLOR": "1"} if no_color else {})
    with subprocess.Popen(
        [sys.executable, "-m", "rrcli", "compare"], cwd=measured, env=environment, stdout=terminal, stdin=terminal
    ) as process:
        os.close(terminal)
        shown = b""
        try:
            while chunk := os.read(controller, 65536):
                shown += chunk
        except OSError:  # Linux says so when the other end is closed
            pass
    os.close(controller)
    assert process.returncode == 0
    assert b"Perplexity" in shown
    assert bool(re.search(rb"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])[;m]", shown)) is not no_color


def test_a_narrow_terminal_still_shows_every_number(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = rr("compare", directory=measured)
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "7.37" in shown.stdout
    assert "…" not in shown.stdout
