"""Problems that flipped: which ones they are, and how the terminal, Markdown, JSON and a browser show them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from browser import browser, errors, requests, screen
from comparing import compared, four_stages, publish, results
from rrcli.comparison.comparison import Comparison
from rrcli.comparison.flips import Flips, flips_of
from rrcli.comparison.report import render
from rrcli.comparison.results import Stage
from rrcli.evaluation import metrics
from rrcli.files import write_json
from test_cli_surface import rr

ATTACK = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&lt;b&gt;"


def with_texts(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give every problem a prompt, a right answer, a difficulty and an output, some of which look like markup."""
    for stage in made:
        for i, problem in enumerate(stage["records"]["problems"]):
            problem |= {"question": f"q{i}", "prompt": f"Question: q{i} {ATTACK}\nAnswer:", "answer": f"right {i}"}
            problem["difficulty"] = (1, 2, 10)[i % 3]
            problem["outputs"] = [f"{'right' if hit else 'wrong'} {i} {ATTACK}" for hit in problem["correct"]]
    return made


def with_depths(stage: dict[str, Any]) -> dict[str, Any]:
    """Give a stage depth 0, at which every third problem is right, depth 1, and an exit that is right as depth 1 is."""
    for i, problem in enumerate(stage["records"]["problems"]):
        own = problem["correct"][-1]
        problem["correct"] = problem["strict"] = [i % 3 == 0, own, own]
        problem["outputs"] = [f"{'right' if hit else 'wrong'} {i}" for hit in problem["correct"]]
        words = (f"{'right' if own else 'wrong'}", f" {i}", ATTACK)
        problem["pieces"] = [(text, number) for number, text in enumerate(words)]
        problem["outputs"][-1] = "".join(words)
    for row in stage["records"]["documents"]:
        row |= {"nll": row["nll"] * 3, "correct": row["correct"] * 3}
    stage["model"] |= {"depth": 1, "exit": {"rule": "probability", "threshold": 0.9}}
    stage["by_depth"] = metrics.by_depth(stage["records"], 2)
    return stage


def four() -> list[dict[str, Any]]:
    made = with_texts(four_stages())
    with_depths(made[3])
    return made


def stages_of(*made: dict[str, Any]) -> list[Stage]:
    return [Stage(value["stage"], (value,)) for value in made]


@pytest.fixture(scope="module")
def flips() -> Flips:
    return flips_of(stages_of(*four()))


# -- which problems they are -------------------------------------------------------------------------------------------


def test_recursion_is_compared_with_vanilla_as_both_were_measured(flips: Flips) -> None:
    names = [view.name for view in flips.views]
    assert names == [
        *("baseline", "after_surgery", "finetuned_vanilla"),
        *("finetuned_recursive, depth 0", "finetuned_recursive, depth 1", "finetuned_recursive, exit probability:0.9"),
    ]
    assert (names[flips.before], names[flips.after]) == (names[2], names[5])
    assert flips.compared == 200
    vanilla, recursive = ([r["correct"][-1] for r in made["records"]["problems"]] for made in four()[2:])
    right = [f"right {i}" for i in range(200)]
    fixed = [answer for answer, a, b in zip(right, vanilla, recursive, strict=True) if b and not a]
    broken = [answer for answer, a, b in zip(right, vanilla, recursive, strict=True) if a and not b]
    assert [p.expected for p, *_ in flips.of("fixed")] == fixed
    assert [p.expected for p, *_ in flips.of("broken")] == broken
    assert len(fixed) == 33
    assert len(broken) == 0
    assert "Of 200 problems, finetuned_recursive, exit probability:0.9 answers 33 right" in flips.sentence()


def test_only_problems_that_flip_somewhere_are_kept_and_all_are_counted(flips: Flips) -> None:
    seen = [set() for _ in range(200)]
    for made in four():
        for hits, record in zip(seen, made["records"]["problems"], strict=True):
            hits.update(record["correct"])
    assert len(flips.problems) == sum(len(hits) == 2 for hits in seen)
    assert sum(flips.alike.values()) == sum(len(hits) == 1 for hits in seen)
    assert {alike.right for alike in flips.alike} == {True, False}
    answers = flips.problems[0].answers
    assert answers[5] is not None
    assert [passes for _, passes in answers[5].pieces] == [0, 1, 2]
    assert answers[4] is not None
    assert answers[4].pieces == ()


@pytest.mark.parametrize(
    ("chosen", "pair"),
    [
        ((0, 2), ("baseline", "finetuned_vanilla")),
        ((2, 0), ("finetuned_vanilla", "baseline")),
        ((0, 1), ("baseline", "after_surgery")),
        ((0, 3), ("baseline", "finetuned_recursive, exit probability:0.9")),
        ((3, 2), ("finetuned_vanilla", "finetuned_recursive, exit probability:0.9")),
        ((3,), ("finetuned_recursive, depth 0", "finetuned_recursive, exit probability:0.9")),
    ],
)
def test_of_other_stages_the_last_is_compared_with_the_first(chosen: tuple[int, ...], pair: tuple[str, str]) -> None:
    made = four()
    found = flips_of(stages_of(*(made[place] for place in chosen)))
    assert (found.views[found.before].name, found.views[found.after].name) == pair


def test_problems_with_other_content_under_one_key_are_not_compared() -> None:
    made = four()[:2]
    made[1]["records"]["problems"][5]["question"] = "another"
    found = flips_of(stages_of(*made))
    assert found.compared == 199


def test_each_seed_is_compared_with_the_baseline_on_its_own_problems() -> None:
    baseline, vanilla = with_texts([results("baseline"), results("finetuned_vanilla", solved=30)])
    other = with_texts([results("finetuned_vanilla", solved=60)])[0] | {"seed": 1}
    for record in other["records"]["problems"]:
        record["key"] = f"second {record['key']}"
    more = with_texts([results("baseline")])[0]["records"]["problems"]
    baseline["records"]["problems"] += [record | {"key": f"second {record['key']}"} for record in more]
    vanilla["seed"] = 0
    found = flips_of([Stage("baseline", (baseline,)), Stage("finetuned_vanilla", (vanilla, other))])
    assert found.compared == 400
    seeds = [problem.seed for problem, *_ in found.of("fixed")]
    assert (seeds.count(0), seeds.count(1)) == (30, 60)


def test_nothing_is_compared_with_itself(tmp_path: Path) -> None:
    made = with_texts([results("baseline")])
    assert flips_of(stages_of(*made)).compared == 0
    for stage in made:
        del stage["records"]["problems"]
    assert flips_of(stages_of(*made)).views == []


# -- in text -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return compared(tmp_path, *four(), generations=True)


def test_the_terminal_shows_the_first_ones_and_says_how_many_there_are(tmp_path: Path) -> None:
    publish(tmp_path, *four())
    shown = " ".join(rr("compare", "--generations", directory=tmp_path).stdout.split())
    assert "answers 33 right that finetuned_vanilla answers wrong, and 0 wrong" in shown
    assert "23 more are fixed: --report FILE.html or --json has all of them." in shown
    assert shown.count("Question: q") == 10
    assert "<script>" in shown


def test_json_has_all_of_them(comparison: Comparison) -> None:
    value = comparison.to_dict()["flips"]
    assert (value["before"], value["compared"]) == ("finetuned_vanilla", 200)
    assert (len(value["fixed"]), len(value["broken"])) == (33, 0)
    assert value["fixed"][0]["before"].startswith("wrong")
    assert value["fixed"][0]["after"].startswith("right")
    assert value["fixed"][0]["pieces"][0] == ("right", 0)
    json.dumps(value, allow_nan=False)


def test_markdown_shows_texts_to_the_letter(tmp_path: Path) -> None:
    publish(tmp_path, *four())
    rr("compare", "--generations", "--out", "x.md", directory=tmp_path)
    text = (tmp_path / "x.md").read_text(encoding="utf-8")
    assert "## Flipped problems" in text
    flipped = text.partition("## Flipped problems")[2]
    assert not re.search(r"(?<!\\)<(?!br>)", flipped)
    rows = [line for line in flipped.splitlines() if line.startswith("| Question")]
    assert len(rows) == 10
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)


# -- in a browser ------------------------------------------------------------------------------------------------------


def many(folder: Path) -> Comparison:
    """Compare two stages with 5,000 problems, of which every one flips at some depth."""
    made = with_texts([results("finetuned_vanilla"), results("finetuned_recursive")])
    for stage in made:
        first = stage["records"]["problems"]
        stage["records"]["problems"] = [
            first[i % 200] | {"key": f"p{i}", "question": f"q{i}", "prompt": f"Question {i}: " + "what now? " * 20}
            | {"correct": [hits := (i % 7 == 0) == (stage is made[0])], "strict": [hits]}
            | {"outputs": [f"{'right' if hits else 'wrong'} {i} " + "because of this " * 20]}
            for i in range(5000)
        ]  # fmt: skip
        if stage is made[1]:
            with_depths(stage)
    return compared(folder, *made)


def value(opened: Any, script: str) -> Any:
    return opened.execute_script(f"return {script}")


def choose(opened: Any, name: str, chosen: str) -> None:
    opened.execute_script(
        "const c = document.getElementById('flips-' + arguments[0]);"
        "c.value = arguments[0] === 'words' ? arguments[1] : [...c.options].find(o => o.text === arguments[1]).value;"
        "c.dispatchEvent(new Event(arguments[0] === 'words' ? 'input' : 'change'))",
        name, chosen,
    )  # fmt: skip


SUM = "document.getElementById('flips-sum').textContent"
CARDS = "document.querySelectorAll('#flips-list .flip').length"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    publish(folder, *four())
    assert rr("compare", "--report", "r.html", directory=folder).exit_code == 0
    return folder / "r.html"


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_filters_and_turns_and_never_runs_a_text(page: Path, width: int) -> None:
    with browser() as opened:
        screen(opened, width)
        opened.get(page.as_uri())
        assert requests(opened) == [page.as_uri()]
        assert errors(opened) == []
        assert value(opened, SUM) == "Of 200 problems: 33 fixed, 0 broken; net +33 (+16.5 points)."
        assert value(opened, CARDS) == 20
        opened.execute_script("document.getElementById('flips-on').click()")
        assert value(opened, CARDS) == 13
        assert value(opened, "document.getElementById('flips-place').textContent") == "21–33 of 33"
        assert value(opened, "document.getElementById('flips-on').disabled")
        choose(opened, "task", "chain_sum")
        choose(opened, "level", "10")
        assert re.match(r"Of 33 problems: \d fixed, 0 broken", value(opened, SUM))
        assert value(opened, "document.querySelector('#flips-list .flip h3').textContent").endswith(
            "chain_sum · difficulty 10"
        )
        choose(opened, "task", "all")
        choose(opened, "level", "all")
        choose(opened, "before", "finetuned_recursive, depth 0")
        choose(opened, "after", "finetuned_recursive, exit probability:0.9")
        problems = four()[3]["records"]["problems"]
        fixed, broken = (sum(r["correct"][0] is was and r["correct"][2] is not was for r in problems)
                         for was in (False, True))  # fmt: skip
        assert value(opened, SUM).startswith(f"Of 200 problems: {fixed} fixed, {broken} broken; net ")
        choose(opened, "kind", "broken")
        assert value(opened, f"Math.min(20, {CARDS})") == min(20, broken)
        spans = "[...document.querySelectorAll('#flips-list .flip .side:last-child .output span')].slice(0, 3)"
        # "wrong 0" before, "right 0" and more after: the first word differs, and pieces have 0, 1 and 2 passes.
        assert value(opened, f"{spans}.map(s => s.className)") == ["p0 differs", "p1", "p2 differs"]
        assert value(opened, f"{spans}[2].textContent") == ATTACK
        choose(opened, "words", "q100 ")
        assert value(opened, SUM).startswith("Of 1 that match")
        asked = value(opened, "document.querySelector('#flips-list .asked')?.textContent ?? ''")
        assert asked in ("", f"Question: q100 {ATTACK}\nAnswer:")
        assert value(opened, "document.title") != "owned"
        assert value(opened, "document.querySelectorAll('img').length") == 0
        assert value(opened, "document.documentElement.scrollWidth") <= width
        # Even a script that got into the page would not run.
        opened.execute_script(
            "const s = document.createElement('script'); s.textContent = 'document.title = \"owned\"';"
            "document.body.append(s)"
        )
        assert value(opened, "document.title") != "owned"


def cpu_seconds(opened: Any) -> float:
    """Return how long the page's thread has worked, which other work on the machine does not change."""
    found = opened.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return next(metric["value"] for metric in found if metric["name"] == "TaskDuration")


def test_five_thousand_problems_are_shown_at_once(tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    page.write_text(render(many(tmp_path), tmp_path / "logs"), encoding="utf-8")
    with browser() as opened:
        screen(opened, 1280)
        opened.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        opened.get(page.as_uri())
        assert errors(opened) == []
        assert value(opened, SUM).startswith("Of 5,000 problems: 4,285 fixed, 715 broken")
        loaded = cpu_seconds(opened)
        opened.execute_script(
            "const c = document.getElementById('flips-kind');"
            "for (const kind of ['fixed', 'broken', '', 'fixed']) {"
            "c.value = kind; c.dispatchEvent(new Event('change')); document.body.getBoundingClientRect(); }"
        )
        filtered = (cpu_seconds(opened) - loaded) / 4
    size = page.stat().st_size
    print(f"{size:,} bytes, loaded in {loaded:.2f} s, filtered in {filtered:.2f} s of one core")
    assert size < 12_000_000
    assert loaded < 5
    assert filtered < 0.3


def test_results_of_a_newer_rr_may_have_pieces_that_are_not_understood(tmp_path: Path) -> None:
    made = four()
    made[3]["records"]["problems"][0]["pieces"] = [["text"]]
    for stage in made:
        write_json(tmp_path / "eval_results" / f"{stage['stage']}_results.json", stage)
    failed = rr("compare", directory=tmp_path)
    assert failed.exit_code == 1
    assert "pieces" in failed.stderr
