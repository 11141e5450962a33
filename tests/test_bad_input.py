"""Bad input at the command line: a clear error, the right exit code, nothing half-written."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from commands import rr, rr_process
from rrcli.demo import defaults


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Assert an `error:` line with these words and no traceback."""
    assert done.returncode == code, done.stderr
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, f"{word!r} not in {done.stderr}"


def model_copy(folder: Path) -> Path:
    return Path(shutil.copytree(defaults.MODEL_DIR, folder / "model"))


def nothing_written(folder: Path) -> bool:
    return not [p for p in (folder / "eval_results", folder / "checkpoints") if p.exists() and any(p.iterdir())]


def test_a_model_folder_without_weights(tmp_path):
    (model_copy(tmp_path) / "model.safetensors").unlink()
    for run in (rr, rr_process):
        refused(run("eval", "--model", "model", folder=tmp_path), 1, "no weights", "hint:")
    assert nothing_written(tmp_path)


def test_a_model_folder_with_pickled_weights_only(tmp_path):
    weights = model_copy(tmp_path) / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    refused(rr("surgery", "--model", "model", folder=tmp_path), 1, "pickled", "never read")


@pytest.mark.parametrize("command", [("eval",), ("surgery",), ("train", "--mode", "vanilla")], ids=lambda c: c[0])
def test_a_truncated_weight_file_is_named_with_its_bytes(tmp_path, command):
    weights = model_copy(tmp_path) / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as file:
        file.truncate(size - 1000)
    refused(
        rr(*command, "--model", "model", folder=tmp_path),
        1,
        "model.safetensors is truncated",
        f"{size}",
        f"{size - 1000}",
    )
    assert nothing_written(tmp_path)


def test_weights_that_would_be_random_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    weights = model_copy(tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    missing = next(name for name in tensors if "mlp" in name)
    save_file({k: v for k, v in tensors.items() if k != missing}, weights, metadata={"format": "pt"})
    refused(rr("eval", "--model", "model", folder=tmp_path), 1, "lacks 1 tensors", missing, "random")


def test_a_gguf_file_that_is_none(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    refused(rr("eval", "--model", "x.gguf", folder=tmp_path), 1, "not a GGUF file")


def test_a_model_that_is_not_there(tmp_path):
    refused(rr("eval", "--model", "./nowhere", folder=tmp_path), 2, "does not exist")
    done = rr("eval", "--model", "some-org/some-model", folder=tmp_path, HF_HUB_OFFLINE="1")
    refused(done, 1, "cannot be downloaded")


def test_an_empty_data_file(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    refused(rr("eval", "--data", "empty.txt", folder=tmp_path), 1, "empty.txt is empty")
    refused(rr("train", "--mode", "vanilla", "--data", "empty.txt", folder=tmp_path), 1, "empty.txt is empty")
    assert nothing_written(tmp_path) or not list((tmp_path / "checkpoints").rglob("*.json"))


def test_a_data_file_that_is_not_utf_8_is_named_with_its_line(tmp_path):
    (tmp_path / "latin.txt").write_bytes("eins\n\nzwei\n\nfünf".encode("latin-1"))
    refused(rr("eval", "--data", "latin.txt", folder=tmp_path), 1, "not UTF-8", "0xfc", "line 5")


def test_an_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "results").write_text("mine")
    refused(rr("eval", "--output-dir", "results", folder=tmp_path), 1, "is a file", "hint:")
    refused(rr("surgery", "--checkpoint-dir", "results", folder=tmp_path), 1, "is a file")
    refused(rr("setup", "--log-dir", "results/logs", folder=tmp_path), 1, "is a file")
    assert (tmp_path / "results").read_text() == "mine"


def test_a_folder_that_cannot_be_written(tmp_path):
    # /proc refuses new folders to everybody, root included.
    refused(rr("eval", "--output-dir", "/proc/results", folder=tmp_path), 1, "cannot create /proc/results", "hint:")
    if os.geteuid() != 0:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        refused(rr("setup", "--dir", str(closed), folder=tmp_path), 1, "closed")


def test_results_that_are_cut_off(tmp_path):
    (tmp_path / "eval_results").mkdir()
    file = tmp_path / "eval_results" / "baseline_results.json"
    file.write_text('{"schema": 1, "stage": "base')
    refused(rr("compare", "baseline", folder=tmp_path), 1, "cut off", "rr eval --stage baseline")
    file.write_text("[1, 2]")
    refused(rr("compare", "baseline", folder=tmp_path), 1, "no JSON object")


def test_a_base_that_changed_after_surgery_is_shown_with_both_fingerprints(tmp_path):
    weights = model_copy(tmp_path) / "model.safetensors"
    assert rr("surgery", "--model", "model", folder=tmp_path).returncode == 0
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = rr("eval", "--stage", "after_surgery", "--model", "checkpoints/after_surgery", folder=tmp_path)
    refused(done, 1, "changed", "was made for", "found", "rr surgery --overwrite")


def test_surgery_refuses_to_overwrite_or_to_write_into_the_model(tmp_path):
    model = model_copy(tmp_path)
    before = sorted(p.name for p in model.iterdir())
    refused(rr("surgery", "--model", "model", "--checkpoint-dir", "model", folder=tmp_path), 1, "inside the base model")
    assert sorted(p.name for p in model.iterdir()) == before
    assert rr("surgery", "--model", "model", folder=tmp_path).returncode == 0
    refused(rr("surgery", "--model", "model", folder=tmp_path), 1, "exists already", "--overwrite")
    assert rr("surgery", "--model", "model", "--overwrite", folder=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("eval", "--stage", "basline"), ("unknown stage 'basline'", "Did you mean 'baseline'?")),
        (("compare", "finetuned_recursiv"), ("Did you mean 'finetuned_recursive'?",)),
        (("evall",), ("unknown command 'evall'", "Did you mean 'eval'?")),
        (("surgery", "--span", "3"), ("span '3' is not understood", "START:END")),
        (("surgery", "--span", "2:99"), ("after the model's", "layers")),
        (("surgery", "--max-steps", "9"), ("--max-steps is 9", "at most 8")),
        (("eval", "--task", "chain_sums"), ("unknown task 'chain_sums'", "Did you mean 'chain_sum'?")),
        (("train", "--mode", "vanila"), ("mode is 'vanila'",)),
        (("train", "--run-name", "../x"), ("not a plain name",)),
        (("eval", "--dtype", "float23"), ("--dtype is 'float23'", "float32")),
        (("eval", "--device", "tpu9"), ("tpu9",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_a_word_that_means_nothing_exits_2_with_a_hint(tmp_path, command, words):
    refused(rr(*command, folder=tmp_path), 2, *words)


def test_an_unknown_option_is_answered_with_the_closest(tmp_path):
    done = rr("eval", "--stag", "baseline", folder=tmp_path)
    assert done.returncode == 2
    assert "--stage" in done.stderr


def test_an_unknown_key_in_the_settings_file_is_answered_with_the_closest(tmp_path):
    (tmp_path / "rr.toml").write_text("[train]\nstepps = 3\n")
    refused(rr("eval", folder=tmp_path), 2, "stepps", "[train]", "Did you mean 'steps'?")


def test_debug_shows_the_traceback(tmp_path):
    done = rr_process("compare", "--debug", folder=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
