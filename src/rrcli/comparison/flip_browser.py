"""The report's browser of problems that flipped: its data, compact enough for thousands of problems, and its script.

The page holds the data as JSON and draws what is looked at. No text of a model or a data set can become markup: the
script writes texts as text nodes alone, the JSON holds no `<`, and the page's policy allows this one script by its
hash, and no address.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

from rrcli.comparison.flips import Alike, FlippedProblem, Flips, ViewedAnswer

# What may not stand in a <script> element as it is; JSON may write any character as an escape.
UNSAFE = re.compile("[<>&\u2028\u2029]")


class _Indices:
    """Numbers values in the order of their first use."""

    def __init__(self) -> None:
        self.places: dict[Any, int] = {}

    def of(self, value: Any) -> int:
        return self.places.setdefault(value, len(self.places))


def script() -> str:
    """Return the browser's script."""
    return files("rrcli.comparison").joinpath("flips.js").read_text(encoding="utf-8")


def policy(code: str) -> str:
    """Return the page's Content-Security-Policy: this script, the page's own styles and drawings, no network."""
    found = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{found}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def data(flips: Flips) -> str:
    """Return what the script reads, as JSON that can stand in an HTML page.

    Every distinct text stands once, in `texts`, and is meant by its place. A problem is [task, difficulty, seed,
    prompt, expected answer, answers]; an answer is 0 (not asked), [right, output] or [right, output, pieces]; a piece
    is [text, passes]. `alike` counts the problems that did not flip: [task, difficulty, seed, right, views asked,
    count].
    """
    texts, tasks, levels = _Indices(), _Indices(), _Indices()
    all_problems: list[FlippedProblem | Alike] = [*flips.problems, *flips.alike]
    seeds = sorted({problem.seed for problem in all_problems if problem.seed is not None})

    def about(problem: FlippedProblem | Alike) -> list[int]:
        seed = seeds.index(problem.seed) if problem.seed is not None else 0
        return [tasks.of(problem.task), levels.of(problem.difficulty), seed]

    def answer(given: ViewedAnswer | None) -> Any:
        if given is None:
            return 0
        found: list[Any] = [int(given.right), texts.of(given.output)]
        return [*found, [[texts.of(text), passes] for text, passes in given.pieces]] if given.pieces else found

    problems = [
        [*about(p), texts.of(p.prompt), texts.of(p.expected), [answer(given) for given in p.answers]]
        for p in flips.problems
    ]
    alike = [
        [*about(group), int(group.right), [int(asked) for asked in group.asked], count]
        for group, count in flips.alike.items()
    ]
    value = {
        "views": [[view.name, view.passes] for view in flips.views],
        "before": flips.before,
        "after": flips.after,
        "seeds": seeds,
        "problems": problems,
        "alike": alike,
        "tasks": list(tasks.places),
        "levels": list(levels.places),
        "texts": list(texts.places),
    }
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
