"""The frontier of exit rules, as `rr eval --exits` wrote it, for charts. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rrcli import schemas
from rrcli.files import read_json

# The names of the lines in a chart, in their order; of the others there is one point or none.
LINES = {
    "depth": "fixed depth",
    "probability": "probability",
    "margin": "margin",
    "head": "boundary head",
    "unchanged": "unchanged",
    "contraction": "contraction",
    "random": "random",
}


def read_frontier(file: Path, stage: str) -> dict[str, Any] | None:
    """Read the frontier of a stage; None if there is none.

    Raises:
        RRError: the file is not what `rr eval --exits` writes.
    """
    return dict(read_json(file, f"rr eval --stage {stage} --exits", schemas.Exits)) if file.is_file() else None


def lines_of(frontier: Mapping[str, Any], quality: str, cost: str) -> dict[str, list[tuple[float, float]]]:
    """Return rule -> (cost, quality) of its thresholds on the test side, from cheap to dear.

    Args:
        quality: `accuracy` or `nats`. cost: `mflop` or `passes` of answers, `text_mflop` or `text_passes` of text.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in frontier["test"]:
        y = point[quality]["value"] if quality == "accuracy" and point[quality] else point[quality]
        if point["rule"] in LINES and y is not None and point[cost] is not None:
            lines.setdefault(point["rule"], []).append((point[cost], y))
    return {LINES[rule]: sorted(lines[rule]) for rule in LINES if rule in lines}
