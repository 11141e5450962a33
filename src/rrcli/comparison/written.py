"""Writes a comparison as a document: CSV, Markdown, LaTeX or parquet. pandas makes the tables."""

from __future__ import annotations

from rrcli.comparison import tables
from rrcli.comparison.comparison import Comparison
from rrcli.comparison.flips import KINDS, SHOWN, Flips
from rrcli.comparison.tables import foreign_in_markdown, in_markdown


def csv_text(comparison: Comparison) -> str:
    """Return the rows of `Comparison.to_frame` as CSV."""
    return tables.csv_text(comparison.to_frame())


def parquet(comparison: Comparison) -> bytes:
    """Return the rows of `Comparison.to_frame` as a parquet file."""
    return tables.parquet(comparison.to_frame())


def latex(comparison: Comparison) -> str:
    """Return the table as it is shown, in LaTeX, with its note as a comment."""
    return f"% {comparison.note}\n{tables.latex(*comparison.texts())}"


def markdown(comparison: Comparison) -> str:
    """Return the table, the sentences, the warnings, the gates and the texts as Markdown."""
    first = [f"**{in_markdown(comparison.broken_surgery)}**", ""] if comparison.broken_surgery else []
    lines = [*first, tables.markdown(*comparison.texts()), "", comparison.note, ""]
    lines += [f"- {in_markdown(sentence)}" for sentence in comparison.sentences]
    lines += [f"- **Warning:** {in_markdown(warning)}" for warning in comparison.warnings]
    lines += [f"- Gate `{gate.gate}` {'holds' if gate.holds else 'does **not** hold'}" for gate in comparison.gates]
    for generation in comparison.generations:
        lines += ["", f"### {foreign_in_markdown(generation.prompt.strip())}", ""]
        for stage, text in zip(comparison.labels, generation.texts, strict=True):
            lines.append(f"- **{in_markdown(stage)}**: {'(none)' if text is None else foreign_in_markdown(text)}")
    if comparison.flips is not None:
        lines += _flipped(comparison.flips)
    return "\n".join(lines) + "\n"


def _flipped(flips: Flips) -> list[str]:
    """Return the first problems that were fixed, and that were broken, with both answers."""
    lines = ["", "## Flipped problems", "", in_markdown(flips.sentence())]
    names = ["Problem", "Expected", flips.views[flips.before].name, flips.views[flips.after].name]
    for kind in KINDS:
        found = flips.of(kind)[:SHOWN]
        if found:
            rows = [[p.prompt.strip(), p.expected, a.output.strip(), b.output.strip()] for p, a, b in found]
            lines += ["", f"### {kind.capitalize()}", "", tables.markdown(names, rows, foreign=True)]
            lines += ["", flips.more(kind)] if flips.more(kind) else []
    return lines
