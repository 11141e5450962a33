"""Puts what `rr costs` measured of several stages in turns in the place of what each stage measured by itself.

Only times that were measured in turns can be compared, so stages that were not measured with the others, or whose model
has changed since, are named. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rrcli import schemas
from rrcli.comparison.results import Results, Stage, Stages
from rrcli.evaluation.metrics import is_cost
from rrcli.files import read_json

MADE_BY = "rr costs"


ALONE = f"Speed and memory were measured one stage after the other: '{MADE_BY}' measures all of them in turns."


def with_costs(stages: Stages, file: Path) -> tuple[dict[str, Stage], list[str], list[str]]:
    """Return the stages with the costs that `rr costs` measured, and sentences and warnings about those without them.

    Of a stage with several seeds one is measured, and its costs stand for all of them.

    Args:
        file: what `rr costs` wrote; it need not exist.

    Raises:
        RRError: the file cannot be read.
    """
    costs = read_json(file, MADE_BY, schemas.Costs) if file.is_file() else None
    known = costs["stages"] if costs is not None else {}
    found: dict[str, Stage] = {}
    alone, changed = [], []
    for label, stage in stages.items():
        own = known.get(stage.name)
        run = stage.by_seed.get(own.get("seed", 0)) if own is not None else None
        if own is not None and run is not None and _method({**own, **own["model"]}) == _method(run["model"]):
            found[label] = replace(stage, runs=tuple(_with(one, own) for one in stage.runs), shared_costs=True)
            continue
        found[label] = stage
        changed += [label] * (own is not None and run is not None)
        alone += [label] * any(is_cost(name) for one in stage.runs for name in one["metrics"])
    warnings = []
    if changed:
        warnings.append(
            f"{file.name} holds the costs of another model, depth or exit of {', '.join(changed)}, which are not "
            f"shown: '{MADE_BY}' measures them again"
        )
    if alone and known:
        warnings.append(
            f"speed and memory of {', '.join(alone)} were measured at another time than those of the other stages: "
            f"'{MADE_BY}' measures all of them in turns"
        )
    said = [ALONE] if len(alone) > 1 and not known else []
    if costs is not None and any(found[label] is not stage for label, stage in stages.items()):
        said.append(_conditions(costs))
    return found, said, warnings


def _conditions(costs: schemas.Costs) -> str:
    """Say under which conditions costs were measured."""
    made = costs["provenance"]
    hardware, threads, load = (made.get(name) for name in ("hardware", "threads", "load"))
    on = f" on {hardware}" if hardware else ""
    on += f" with {threads} thread{'s' * (threads != 1)}" if isinstance(threads, int) else ""
    busy = f"; the machine's load was {load:g} before" if isinstance(load, float) else ""
    rounds = costs.get("rounds", 1)
    return f"Speed: medians of {rounds} round{'s' * (rounds != 1)}, the stages in turns{on}{busy}."


def _method(model: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what costs depend on: the model, its passes and its exit rule."""
    return tuple(model.get(name) for name in ("fingerprint", "depth", "exit"))


def _with(results: Results, costs: schemas.StageCosts) -> Results:
    """Return the results with other costs."""
    own = {part: {n: v for n, v in results.get(part, {}).items() if not is_cost(n)} for part in ("metrics", "by_depth")}
    return results | {
        "metrics": own["metrics"] | costs["metrics"],
        "by_depth": own["by_depth"] | costs.get("by_depth", {}),
    }
