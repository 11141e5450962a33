"""`rr compare --report`: what the page holds, and how a browser shows it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from browser import browser, errors, requests, screen
from comparing import four_stages, publish, results, stage_results
from rrcli.cli.commands import app
from rrcli.comparison.charts import SERIES, against, smoothed
from rrcli.comparison.curves import read_curves
from rrcli.comparison.frontier import lines_of
from rrcli.comparison.report import check_report_path
from rrcli.errors import RRError, UsageError
from rrcli.settings import STAGES
from rrcli.tracker import MetricsTracker

ATTACK = '<script>alert("x")</script><img src=http://evil.example/x>&amp;'


def stages() -> list[dict[str, Any]]:
    """Four stages with depths, difficulties, prompts, and texts that would break a page which does not escape."""
    made = four_stages()
    for number, stage in enumerate(made):
        for i, problem in enumerate(stage["records"]["problems"]):
            problem["difficulty"] = (1, 2, 10)[i % 3]
            problem |= {"prompt": f"problem {i} {ATTACK}", "question": f"{i}", "answer": f"{i} {ATTACK}"}
            problem["outputs"] = [f"{text} {ATTACK}" for text in problem["outputs"]]
        for i, generation in enumerate(stage["records"]["generations"]):
            generation["prompt"] = f"prompt {i} {ATTACK}"
            generation["text"] = f" one two {'three' if number < 2 else 'four'} {ATTACK}"
        stage["model"] |= {"source": ATTACK}
    recursive = made[3]["by_depth"]
    for name, values in recursive.items():
        recursive[name] = [values[0], values[0] | {"value": values[0]["value"] * 1.1}, values[0]]
    return made


def logs(folder: Path) -> None:
    for run in ("finetuned_vanilla", "finetuned_recursive"):
        with MetricsTracker(folder / "logs" / run) as tracker:
            for step in range(40):
                tracker.log_scalar("train/loss/final_ce", 5.0 / (step + 1), step)
            tracker.log_scalar("train/loss/final_ce", float("nan"), 40)


def report(folder: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """Write a report; return the page and the JSON of the same comparison."""
    done = CliRunner().invoke(app, ["compare", *arguments, "--report", "r.html", "--json", "--dir", str(folder)])
    assert done.exit_code == 0, done.output
    return (folder / "r.html").read_text(encoding="utf-8"), json.loads(done.stdout)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("report")
    publish(folder, *stages())
    logs(folder)
    return folder, *report(folder)


def test_the_page_holds_every_section_and_no_address(written: tuple[Path, str, dict[str, Any]]) -> None:
    folder, page, value = written
    sections = re.findall("<h2>(.*?)</h2>", page)
    assert sections == [
        *("Verdict", "All metrics", "By stage", "By depth", "By difficulty", "Quality against cost", "Training"),
        *("Flipped problems", "Generations", "Provenance"),
    ]
    assert page.count("<svg") == page.count("<figure") == 3 + 3 + 1 + 4 + 1
    assert len(value["sentences"]) == page.count("<li>")
    assert "<mark> four</mark>" in page
    loads = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)|url\(([^)]*)\)|@import""", page.replace("&lt;", "<"))
    assert all(address.startswith(("#", "data:", "http://evil")) for pair in loads for address in pair if address)
    assert not list(folder.glob(".r.html*"))


def test_a_frontier_of_exits_is_drawn_with_its_counts(tmp_path: Path) -> None:
    publish(tmp_path, *stages())
    rules = [("depth", depth, 80 + 10 * depth, 1 + depth) for depth in range(3)]
    rules += [("probability", 0.5, 85, 1.2), ("probability", 0.9, 99, 1.5), ("oracle", 0, None, None)]
    points = [
        {"name": f"{rule}:{threshold}", "rule": rule, "threshold": threshold, "nats": 2.0 - 0.1 * number}
        | {"accuracy": None if accuracy is None else {"value": accuracy, "low": 1, "high": 100, "n": 20}}
        | {"passes": cost, "mflop": cost, "text_passes": cost, "text_mflop": cost}
        for number, (rule, threshold, accuracy, cost) in enumerate(rules)
    ]
    n = {"problems": 20, "documents": 3, "tokens": 4321}
    frontier = {"schema": 1, "stage": "finetuned_recursive", "loss": 1.0, "chosen": None}
    frontier |= {"n": {"test": n, "validation": n}, "validation": points, "test": points}
    file = tmp_path / "eval_results" / "finetuned_recursive_exits.json"
    file.write_text(json.dumps(frontier), encoding="utf-8")
    page, _ = report(tmp_path)
    assert "<h2>Exits</h2>" in page
    assert "accuracy of answers, % against MFLOP per answer, 20 problems" in page
    assert "nats per token against MFLOP per token, 4,321 tokens" in page
    assert page.count("fixed depth</text>") == 3
    assert lines_of(frontier, "accuracy", "mflop") == {
        "fixed depth": [(1, 80), (2, 90), (3, 100)], "probability": [(1.2, 85), (1.5, 99)],
    }  # fmt: skip
    file.write_text(json.dumps(frontier | {"test": [{"name": "x"}]}), encoding="utf-8")
    done = CliRunner().invoke(app, ["compare", "--report", "r.html", "--dir", str(tmp_path)])
    assert done.exit_code == 1
    assert "exits.json" in done.output


def test_texts_are_escaped(written: tuple[Path, str, dict[str, Any]]) -> None:
    _, page, _ = written
    assert re.findall("<script[^>]*>", page) == ['<script type="application/json" id="flips-data">', "<script>"]
    assert page.count("</script") == 2
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    assert "&amp;amp;" in page


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_it(written: tuple[Path, str, dict[str, Any]], width: int, dark: bool) -> None:
    folder, _, value = written
    with browser() as opened:
        screen(opened, width, dark=dark)
        opened.get((folder / "r.html").as_uri())
        assert requests(opened) == [(folder / "r.html").as_uri()]
        assert errors(opened) == []
        wide = opened.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
        cells = opened.execute_script(
            "return [...document.querySelectorAll('#metrics td')].map(x => [x.dataset.metric, x.dataset.stage, "
            "x.dataset.value === undefined ? null : Number(x.dataset.value)])"
        )
        expected = [
            [row["name"], stage, cell["value"]]
            for row in value["rows"]
            for stage, cell in zip(value["stages"], row["cells"], strict=True)
        ]
        assert cells == expected
        charts = opened.execute_script(
            "return [...document.querySelectorAll('figure')].map(f => [f.ariaLabel, f.getBoundingClientRect().width, "
            "[...f.querySelectorAll('use')].filter(u => u.getBoundingClientRect().width > 0).length, "
            "Math.min(...[...f.querySelectorAll('text')].map(t => t.getBoundingClientRect().height))])"
        )
        assert charts
        for label, size, marks, height in charts:
            assert size <= width, label
            assert marks > 2, label
            assert height >= 8, label  # pixels: still to be read
        ink, paper = (
            opened.execute_script(f"return getComputedStyle(document.{x}")
            for x in ("querySelector('svg text')).fill", "body).backgroundColor")
        )
        bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) > 380 for colour in (ink, paper)]
        assert bright == ([True, False] if dark else [False, True])


def test_each_task_has_its_own_chart_by_difficulty(tmp_path: Path) -> None:
    made = four_stages()
    for stage in made:
        for i, problem in enumerate(stage["records"]["problems"]):
            problem["difficulty"] = ("sums, terms 2", "sums, terms 10", "grids, n 3")[i % 3]
    publish(tmp_path, *made)
    page, _ = report(tmp_path)
    labels = re.findall(r'<figure[^>]*aria-label="([^"]*)"', page)
    assert [label for label in labels if label.startswith("By difficulty")] == [
        "By difficulty: Reasoning accuracy, %: grids, n",
        "By difficulty: Reasoning accuracy, %: sums, terms",
    ]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    publish(tmp_path, stage_results("baseline"))
    page, _ = report(tmp_path)
    for words in (
        "There is nothing to judge",
        "No stage was measured at more than one depth",
        "No problem in these results has a difficulty",
        "No stage has both a quality and a cost",
        "holds no training curves",
        "No problem is right in one stage, or at one depth, and wrong in another",
        "These results hold no generations",
    ):
        assert words in page


def test_an_evaluation_without_records_is_shown_and_not_judged(tmp_path: Path) -> None:
    made = [results(stage) | {"records": {}} for stage in STAGES[:2]]
    publish(tmp_path, *made)
    page, value = report(tmp_path)
    assert "not known whether surgery preserved the baseline: the two stages have no record in common" in page.replace(
        "&#39;", "'"
    )
    assert all(cell["verdict"] == "" for row in value["rows"] for cell in row["cells"])


def test_the_same_comparison_is_the_same_file(tmp_path: Path) -> None:
    publish(tmp_path, *four_stages()[:2])
    assert report(tmp_path)[0] == report(tmp_path)[0]


def test_a_report_that_cannot_be_written_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="report is 'r") as usage:
        check_report_path("r.pdf")
    assert ".html" in usage.value.hint
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RRError, match="jinja2 and matplotlib") as caught:
        check_report_path("r.html")
    assert "rrcli[report]" in caught.value.hint


def test_curves_are_read_as_they_were_logged(tmp_path: Path) -> None:
    logs(tmp_path)
    found = read_curves(tmp_path / "logs", ["finetuned_vanilla", "absent"], ["train/loss/final_ce", "absent"])
    assert found.keys() == {"train/loss/final_ce"}
    points = found["train/loss/final_ce"]["finetuned_vanilla"]
    assert points == [(step, pytest.approx(5.0 / (step + 1))) for step in range(40)]


def test_smoothing_starts_at_the_first_value() -> None:
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([1.0, 2.0], keep=0.5) == pytest.approx([1.0, (0.25 + 1.0) / 0.75])


def test_more_series_than_colours_differ_in_their_markers() -> None:
    from rrcli.comparison.charts import Point

    names = [f"s{number}" for number in range(SERIES + 1)]
    svg = against({name: [(0.0, Point(1.0)), (1.0, Point(2.0))] for name in names}, names, "x", "y", whole=True)
    assert "var(--series-0)" in svg
    assert f"var(--series-{SERIES})" not in svg
    assert all(f">{name}<" in svg for name in names)
