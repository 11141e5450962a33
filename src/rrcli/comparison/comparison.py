"""The comparison that `rr compare` shows, and its forms: JSON, a data frame, a table in Markdown, LaTeX or HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rrcli.comparison import formats, tables
from rrcli.comparison.flips import Flips
from rrcli.comparison.results import GateResult, Judgement, MetricRow, PromptTexts, Stage
from rrcli.files import finite

if TYPE_CHECKING:
    from pandas import DataFrame

# The metrics of the curve of quality against cost.
CURVE = (
    *("perplexity", "token_accuracy", "reasoning_accuracy"),
    *("prefill_flops_per_token", "decode_flops_per_token", "time_per_output_token"),
)

# The columns of `Comparison.to_frame`.
COLUMNS = (
    *("metric", "label", "unit", "better", "stage", "seed", "depth", "value", "low", "high"),
    *("difference", "difference_low", "difference_high", "confidence", "role", "p_value", "p_adjusted", "verdict", "n"),
)


@dataclass
class Comparison:
    """Everything that `rr compare` shows.

    Attributes:
        stages: the stages of the table, the reference first. judgements: what is said of each primary claim.
        alpha: the level of all primary claims together.
        recorded: when the claims were recorded, if that was before the first evaluation of a fine-tuned stage; else ''.
        broken_surgery: a sentence that is shown first if surgery did not preserve the baseline; the command then fails.
        frontiers: stage -> what 'rr eval --exits' measured of it, for the report.
        generations: what was written after each prompt. flips: the problems that flipped. Both if they were asked for.
    """

    stages: list[Stage]
    rows: list[MetricRow]
    judgements: list[Judgement] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    generations: list[PromptTexts] = field(default_factory=list)
    gates: list[GateResult] = field(default_factory=list)
    alpha: float = 0.05
    recorded: str = ""
    broken_surgery: str = ""
    frontiers: dict[str, dict[str, Any]] = field(default_factory=dict)
    flips: Flips | None = None

    @property
    def labels(self) -> list[str]:
        """The names of the stages, or the paths of their results files."""
        return [stage.label for stage in self.stages]

    def curves(self) -> dict[str, list[dict[str, Any]]]:
        """Return what quality costs: for each stage the metrics of `CURVE` at depth 0, 1, ..., where they are known.

        A stage whose tokens leave by an exit rule has one point more, with `exit`, for the stage as it was measured.
        """
        rows = {row.metric.name: row for row in self.rows if row.metric.name in CURVE}
        found = {}
        for column, stage in enumerate(self.stages):
            model = stage.first["model"]
            depth = model.get("depth") or 0
            points = [{"depth": k} | _at(rows, column, k, last=k == depth) for k in range(depth + 1)]
            if model.get("exit"):
                points[-1] = {"depth": depth} | _at(rows, column, depth, last=False)
                points.append({"depth": depth, "exit": model["exit"]} | _at(rows, column, -1, last=True))
            found[stage.label] = points
        return found

    @property
    def note(self) -> str:
        """What the differences and the verdicts of the table mean."""
        seeds = any(len(stage.runs) > 1 for stage in self.stages)
        recorded = f"The claims were recorded {self.recorded}, before a fine-tuned stage was measured. "
        return (
            f"Differences are to {self.labels[0]}, on the same documents and problems, with 95 % intervals. A p-value "
            "in the table is exploratory: it is not corrected for the others, and claims nothing. Verdicts are those "
            f"of primary claims, at level {self.alpha:g} for all of them together (Holm), with the interval of their "
            "level. "
            + ("Stages with several seeds show their mean over seeds; seeds count as random. " if seeds else "")
            + (recorded if self.recorded else "")
            + "Sample generations and costs are not tested; speeds are medians with their range."
        )

    def to_frame(self) -> DataFrame:
        """Return a data frame with a row for each metric of each stage.

        A row with a `depth` or a `seed` has only the value at it. Without one, it is the stage's own value, with its
        difference to the first stage; see `Cell` for the other columns.
        """
        return tables.frame(self._values(), COLUMNS)

    def texts(self) -> tuple[list[str], list[list[str]]]:
        """Return the table as it is shown: its header, and its rows of texts, which may have several lines."""
        rows = []
        for row in self.rows:
            cells = [[*formats.value_lines(cell, row), *formats.difference_lines(cell, row)] for cell in row.cells]
            rows.append([formats.row_label(row), *("\n".join(lines) for lines in cells)])
            rows += formats.own_lines(row)
        return ["Metric", *self.labels], rows

    def _repr_html_(self) -> str:
        """Return the table, the sentences and the warnings for a notebook."""
        broken = [self.broken_surgery] if self.broken_surgery else []
        said = [*(s for s in self.sentences if s not in broken), *(f"Warning: {text}" for text in self.warnings)]
        parts = [f"<p><strong>{tables.in_html(text)}</strong></p>" for text in broken]
        parts += [tables.html_table(*self.texts()), f"<p><small>{tables.in_html(self.note)}</small></p>"]
        return "\n".join([*parts, "<ul>", *(f"<li>{tables.in_html(text)}</li>" for text in said), "</ul>"])

    def _values(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of `to_frame`."""
        for row in self.rows:
            metric = row.metric
            about = {"metric": metric.name, "label": metric.label.strip(), "unit": metric.unit, "better": metric.better}
            for column, (stage, cell) in enumerate(zip(self.stages, row.cells, strict=True)):
                names = about | {"stage": stage.label}
                if cell.value is not None:
                    yield names | {name: value for name, value in cell.to_dict().items() if name != "by_seed"}
                for seed, value in zip(stage.by_seed, cell.by_seed, strict=False):
                    yield names | {"seed": seed, "value": value}
                depths = row.depths[column] if row.depths else []
                for depth, value in enumerate(depths if len(depths) > 1 else []):
                    yield names | {"depth": depth, "value": value}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "schema": 2,
            "kind": "comparison",
            "stages": self.labels,
            "seeds": {stage.label: list(stage.by_seed) for stage in self.stages},
            "alpha": self.alpha,
            "rows": [
                {name: getattr(row.metric, name) for name in ("name", "label", "unit", "better")}
                | {"cells": [cell.to_dict() for cell in row.cells]}
                | ({"by_depth": row.depths} if row.depths else {})
                for row in self.rows
            ],
            "curves": self.curves(),
            "claims": [finite(judgement.to_dict()) for judgement in self.judgements],
            "recorded": self.recorded or None,
            "broken_surgery": self.broken_surgery or None,
            "sentences": self.sentences,
            "warnings": self.warnings,
            "generations": [vars(generation) for generation in self.generations],
            **({"flips": self.flips.to_dict()} if self.flips is not None else {}),
            "gates": [vars(gate) for gate in self.gates],
        }


def _at(rows: Mapping[str, MetricRow], column: int, depth: int, *, last: bool) -> dict[str, float]:
    """Return a stage's metrics at a depth; where it is the last, or there is no other, those of the stage itself."""
    found = {}
    for name, row in rows.items():
        depths = row.depths[column] if row.depths else []
        value = depths[depth] if 0 <= depth < len(depths) else row.cells[column].value if last else None
        if value is not None:
            found[name] = value
    return found
