"""`rr generate`: the text is the model's own, streamed in pieces that know how they came about."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import rrcli
from rrcli.cli.commands import app
from rrcli.errors import RRError, UsageError
from rrcli.evaluation.tracing import Piece
from rrcli.reporting import Silent
from rrcli.services.generate import generate
from rrcli.services.surgery import surgery
from rrcli.settings import GenerateSettings, SurgerySettings
from rrcli.ui import console
from rrcli.ui.console import PieceWriter, TerminalReporter

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a sidecar that has learnt something."""
    folder = tmp_path_factory.mktemp("generate")
    surgery(SurgerySettings(), folder, TerminalReporter())
    sidecar = folder / "checkpoints" / "after_surgery" / "recursion.safetensors"
    from safetensors.torch import load_file, save_file

    weights = load_file(sidecar)
    weights["cell.w_out.weight"].normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    save_file(weights, sidecar)
    return folder


def stock_text(workspace: Path | None, new: int) -> str:
    """Return what sequential decoding writes."""
    model, tokenizer = rrcli.load(str(workspace / "checkpoints" / "after_surgery") if workspace else "default")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0)
    return tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_text_is_that_of_sequential_decoding(workspace: Path) -> None:
    got: list[Piece] = []
    result = generate(GenerateSettings(max_new_tokens=40), PROMPT, workspace, got.append)
    assert result.stage == "after_surgery"
    assert result.text == stock_text(workspace, 40)
    assert got == result.pieces
    assert {piece.passes for piece in got} == {2}
    assert any(piece.changed for piece in got)
    assert not all(piece.changed for piece in got)
    assert 1 <= result.metrics["avg_chunk_length"] <= 16


def test_where_chunks_cannot_be_the_text_and_its_passes_are_the_same(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rrcli.upstream.can_be_taken_back", lambda cache: False)
    got: list[Piece] = []
    result = generate(GenerateSettings(max_new_tokens=40), PROMPT, workspace, got.append)
    assert result.text == stock_text(workspace, 40)
    assert {(piece.passes, piece.changed) for piece in got} == {(2, False)}
    assert result.metrics == {}, "no chunk was decoded, so none is counted"


def test_a_stage_without_recursion_is_decoded_as_stock(workspace: Path) -> None:
    result = generate(GenerateSettings(max_new_tokens=20), PROMPT, workspace, lambda piece: None, stage="baseline")
    assert result.text == stock_text(None, 20)
    assert (result.depth, result.metrics) == (0, {})
    at_0 = generate(GenerateSettings(max_new_tokens=20, depth=0), PROMPT, workspace, lambda piece: None)
    assert at_0.text == result.text


def test_sampling_follows_its_seed(workspace: Path) -> None:
    settings = [GenerateSettings(max_new_tokens=30, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    texts = [generate(one, PROMPT, workspace, lambda piece: None).text for one in settings]
    assert texts[0] == texts[1] != texts[2]
    likeliest = generate(GenerateSettings(max_new_tokens=30, temperature=1.0, top_k=1), PROMPT, workspace, print)
    assert likeliest.text == stock_text(workspace, 30)


@pytest.mark.parametrize("stage", ["baseline", "after_surgery"])
def test_text_ends_in_front_of_a_stop_string(workspace: Path, stage: str) -> None:
    whole = generate(GenerateSettings(max_new_tokens=40), PROMPT, workspace, lambda piece: None, stage=stage).text
    # In the midst of words, so that it begins and ends inside of tokens; and one that comes later, or never.
    middle = len(whole) // 2
    stop = (whole[middle - 4 : middle + 5], "\n\n\n", whole[-6:-1])
    first = min((text for text in stop if text in whole), key=lambda text: whole.find(text) + len(text))
    end = whole.find(first)  # the one that is complete first
    got: list[Piece] = []
    result = generate(GenerateSettings(max_new_tokens=40, stop=stop), PROMPT, workspace, got.append, stage=stage)
    assert result.text == whole[:end] == "".join(piece.text for piece in got)
    assert 0 < end < len(whole)


@pytest.mark.parametrize(
    ("settings", "prompt", "stage", "error", "words"),
    [
        (GenerateSettings(), " ", None, UsageError, "prompt is empty"),
        (GenerateSettings(stop=("",)), "a", None, UsageError, "--stop is empty"),
        (GenerateSettings(), "a", "finetuned_vanilla", RRError, "no model yet"),
        (GenerateSettings(), "a", "finetune", UsageError, "unknown stage 'finetune'"),
    ],
)
def test_what_cannot_be_generated_is_said_before_a_model_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: Any,
    prompt: str,
    stage: str | None,
    error: type[RRError],
    words: str,
) -> None:
    monkeypatch.setattr("rrcli.services.generate.load_for", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(error, match=words):
        generate(settings, prompt, tmp_path, lambda piece: None, stage=stage)


@pytest.mark.parametrize(
    ("settings", "prompt", "stage", "words"),
    [
        (GenerateSettings(depth=9), "a", None, "depth is 9"),
        (GenerateSettings(depth=1), "a", "baseline", "has no recursion"),
        (GenerateSettings(), "a " * 3000, None, r"the prompt has \d+ tokens"),
    ],
)
def test_what_does_not_fit_the_model_is_said(
    workspace: Path, settings: Any, prompt: str, stage: str | None, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        generate(settings, prompt, workspace, lambda piece: None, stage=stage)


def test_a_text_that_the_context_cuts_says_so_and_the_json_form_how_it_came_about(workspace: Path) -> None:
    context = rrcli.load("default")[0].config.max_position_embeddings
    reporter = Silent()
    asked = GenerateSettings(max_new_tokens=context, depth=0, seed=3, stop=(".",))
    found = generate(asked, PROMPT, workspace, lambda piece: None, reporter=reporter).to_dict()
    assert f"--max-new-tokens is {context}, but after the" in reporter.warnings[0]
    assert f"has room for {found['max_new_tokens']}: the text ends there" in reporter.warnings[0]
    assert found["max_new_tokens"] < context
    assert (found["seed"], found["exit"], found["depth"]) == (3, None, 0)
    asked = GenerateSettings(max_new_tokens=4, exit="margin:0.5")
    found = generate(asked, PROMPT, workspace, lambda piece: None, reporter=reporter).to_dict()
    assert (found["seed"], found["exit"], len(reporter.warnings)) == (0, "margin:0.5", 1)


def test_piped_text_is_plain_and_json_has_every_piece(workspace: Path) -> None:
    shown = CliRunner().invoke(app, ["generate", PROMPT, "--max-new-tokens", "12", "--trace", "--dir", str(workspace)])
    assert shown.exit_code == 0
    assert shown.stdout == PROMPT + stock_text(workspace, 12) + "\n"
    assert "committed per chunk" in shown.stderr
    asked = ["generate", "-", "--max-new-tokens", "12", "--json", "--dir", str(workspace)]
    shown = CliRunner().invoke(app, asked, input=PROMPT + "\n")
    found = json.loads(shown.stdout)
    assert found["text"] == stock_text(workspace, 12) == "".join(piece["text"] for piece in found["pieces"])
    refused = CliRunner().invoke(app, ["generate", "", "--dir", str(workspace)])
    assert (refused.exit_code, refused.stdout) == (2, "")


def test_a_trace_colours_passes_and_underlines_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "out", lambda: Console(file=screen, force_terminal=True, color_system="standard"))
    write = PieceWriter("p", trace=True)
    for piece in (Piece(" a"), Piece(" b", 1), Piece(" c", 2, changed=True)):
        write(piece)
    assert screen.getvalue() == "\x1b[2mp\x1b[0m a\x1b[36m b\x1b[0m\x1b[4;35m c\x1b[0m"
