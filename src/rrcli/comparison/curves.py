"""Training curves, read back from TensorBoard's event files. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

# run -> [(step, value), ...] in the order of steps
Curves = dict[str, list[tuple[int, float]]]
POINTS = 2000


def read_curves(
    logs: Path, runs: Iterable[str], tags: Iterable[str] | None, *, points: int = POINTS
) -> dict[str, Curves]:
    """Return tag -> run -> points, without runs and tags that were not logged, and without values that are not finite.

    Args:
        tags: None for all of them.
        points: how many points a curve has at most; of a longer one, TensorBoard takes a random sample. 0 = all points.
    """
    runs = [run for run in runs if (logs / run).is_dir()]
    if not runs:
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    wanted = None if tags is None else list(tags)
    found: dict[str, Curves] = {}
    for run in runs:
        events = EventAccumulator(str(logs / run), size_guidance={SCALARS: points})
        events.Reload()
        logged = events.Tags()["scalars"]
        for tag in logged if wanted is None else wanted:
            # A step that was logged again after training was resumed counts once, with its later value.
            by_step = {event.step: event.value for event in events.Scalars(tag)} if tag in logged else {}
            if finite := [(step, value) for step, value in sorted(by_step.items()) if math.isfinite(value)]:
                found.setdefault(tag, {})[run] = finite
    return found
