"""Claims that are declared after their numbers were seen are told from those that were declared before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from comparing import cell, publish, results, sentence
from rrcli.comparison.claims import read_declaration
from rrcli.experiment.declarations import record
from rrcli.experiment.workspace import Workspace
from rrcli.services.compare import compare
from rrcli.settings import CompareSettings

FIRST = CompareSettings(primary=("reasoning_accuracy: finetuned_recursive > finetuned_vanilla",))
MORE = replace(FIRST, primary=(*FIRST.primary, "token_accuracy: finetuned_recursive > finetuned_vanilla"))


def declare(directory: Path, settings: CompareSettings) -> None:
    record(Workspace(directory, settings), read_declaration(settings).texts)


def warnings(directory: Path, settings: CompareSettings) -> list[str]:
    said = compare(settings, [], directory).warnings
    return [text for text in said if "declared" in text or "was changed" in text]


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """An experiment whose first claim was declared before its fine-tuned stages were measured."""
    publish(tmp_path, results("baseline"))
    declare(tmp_path, FIRST)
    declare(tmp_path, FIRST)
    publish(tmp_path, *(results(stage, solved=20) for stage in ("finetuned_vanilla", "finetuned_recursive")))
    return tmp_path


def test_what_was_declared_before_is_not_doubted(measured: Path) -> None:
    (entry,) = json.loads((measured / "eval_results" / "declared.json").read_text())["declarations"]
    assert entry["primary"] == list(FIRST.primary)
    assert entry["measured"] == []
    assert warnings(measured, FIRST) == []


@pytest.mark.parametrize("recorded", [False, True], ids=["only in rr.toml", "recorded by a later evaluation"])
def test_a_claim_that_came_later_is_exploratory(measured: Path, recorded: bool) -> None:
    if recorded:
        declare(measured, MORE)
        declare(measured, FIRST)
        declare(measured, MORE)
    (said,) = warnings(measured, MORE)
    assert said.startswith(f"the claim '{MORE.primary[1]}' was declared after finetuned_vanilla, finetuned_recursive")
    found = compare(MORE, ["finetuned_vanilla", "finetuned_recursive"], measured)
    assert [each.late for each in found.judgements] == [False, True]
    assert sentence(found, f"Claim that came after its numbers (exploratory) '{MORE.primary[1]}'")
    assert cell(found, "token_accuracy", "finetuned_recursive").verdict in ("", "same")
    assert warnings(measured, FIRST) == []


def test_a_level_or_margin_that_came_later_is_said(measured: Path) -> None:
    (said,) = warnings(measured, replace(FIRST, alpha=0.2))
    assert said == "alpha was changed after a fine-tuned stage had been measured: it was 0.05"
    (said,) = warnings(measured, replace(FIRST, margin=("reasoning_accuracy: 30 points",)))
    assert said.startswith("margin was changed after a fine-tuned stage had been measured: it was ['")


def test_a_claim_that_was_dropped_is_said(measured: Path) -> None:
    """With fewer claims, the level of the others is less strict."""
    other = CompareSettings(primary=("token_accuracy: finetuned_recursive > finetuned_vanilla",))
    first, second = warnings(measured, other)
    assert "was declared after finetuned_vanilla" in first
    assert (
        second
        == f"the claim '{FIRST.primary[0]}' was declared before a fine-tuned stage had been measured, and was dropped"
    )


def test_deleting_results_does_not_undo_that_they_were_seen(measured: Path) -> None:
    declare(measured, MORE)
    kept = {file.name: file.read_bytes() for file in (measured / "eval_results").glob("finetuned*")}
    for name in kept:
        (measured / "eval_results" / name).unlink()
    declare(measured, FIRST)
    declare(measured, MORE)
    for name, text in kept.items():
        (measured / "eval_results" / name).write_bytes(text)
    assert any("was declared after" in text for text in warnings(measured, MORE))


def test_claims_without_a_record_are_not_said_to_be_declared(tmp_path: Path) -> None:
    publish(tmp_path, results("baseline"), results("finetuned_vanilla", solved=20))
    (said,) = warnings(tmp_path, FIRST)
    assert "nothing shows that the primary claims were declared before their numbers were known" in said
    assert compare(FIRST, [], tmp_path).recorded == ""


def test_when_claims_were_recorded_is_shown(measured: Path) -> None:
    comparison = compare(FIRST, [], measured)
    assert comparison.recorded
    assert comparison.recorded in comparison.note
    assert comparison.to_dict()["recorded"] == comparison.recorded


def test_claims_may_change_until_something_is_measured(tmp_path: Path) -> None:
    publish(tmp_path, results("baseline"))
    for settings in (FIRST, MORE):
        declare(tmp_path, settings)
    publish(tmp_path, *(results(stage, solved=20) for stage in ("finetuned_vanilla", "finetuned_recursive")))
    assert warnings(tmp_path, MORE) == []
