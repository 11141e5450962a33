"""What reaches a terminal, a file and an output of another encoding."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from commands import rr_process
from comparing import stage_results
from rrcli.evaluation.metrics import from_records
from rrcli.evaluation.tracing import Piece
from rrcli.files import write_json
from rrcli.services.eval import EvalResult
from rrcli.ui import console
from rrcli.ui.console import PieceWriter, visible
from rrcli.ui.results import show_eval


def test_control_characters_are_shown_as_escapes() -> None:
    assert visible("a\tb\nc\rd\x1b[31m\x07\x7f\x9b\0é↓") == "a\tb\nc\\rd\\x1b[31m\\x07\\x7f\\x9b\\x00é↓"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_no_control_characters_and_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(console, "out", lambda: Console(file=screen, force_terminal=True, color_system=None, width=80))
    writer = PieceWriter("[bold]p\r :smile:", trace=False)
    writer(Piece(" \x1b[2J[/bold]"))
    writer.end()
    assert screen.getvalue() == "[bold]p\\r :smile: \\x1b[2J[/bold]\n"


@pytest.mark.parametrize("forced", [False, True], ids=["plain", "FORCE_COLOR"])
def test_a_file_gets_every_byte(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, forced: bool
) -> None:
    if forced:
        monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(open(1, "wb", closefd=False), encoding="latin-1"))  # noqa: SIM115
    writer = PieceWriter("all:\t1\r\n\udcff↓", trace=False)
    writer(Piece("\r\n\ta\x1b\n"))
    writer.end()
    assert capfdbinary.readouterr().out == b"all:\t1\r\n\xff" + "↓\r\n\ta\x1b\n\n".encode()


def test_an_empty_continuation_leaves_the_prompt(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    PieceWriter("all:", trace=False).end()
    assert capfdbinary.readouterr().out == b"all:\n"


def test_names_of_tasks_keep_their_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ["sums:operators=['+','-'],x=[red]:smile:", "sums"]
    problems = [{"key": task, "task": task, "correct": [1], "strict": [1]} for task in tasks]
    results = {"metrics": from_records({"problems": problems}), "by_depth": {}}
    show_eval(EvalResult("baseline", results, Path("x.json")))
    assert tasks[0] in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii"])
def test_a_comparison_is_written_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    for stage, shift in (("baseline", 0.0), ("finetuned_vanilla", 0.1)):
        write_json(tmp_path / "eval_results" / f"{stage}_results.json", stage_results(stage, shift))
    done = rr_process("compare", "--out", "a.md", folder=tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "Perplexity ↓" in (tmp_path / "a.md").read_text(encoding="utf-8")
    shown = rr_process("compare", folder=tmp_path, PYTHONIOENCODING=encoding)
    assert shown.returncode == 0, shown.stderr
    assert "Perplexity v" in shown.stdout
