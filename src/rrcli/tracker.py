"""`MetricsTracker`: the one writer of TensorBoard events."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rrcli.store import METRICS, finite, make_folder, write_json


class MetricsTracker:
    """Writes scalars and text of one run for TensorBoard, and remembers the last value of every scalar.

    Args:
        log_dir: the run's folder, for example `logs/finetuned_recursive`.
        purge_step: on resume, TensorBoard drops what an earlier process logged from this step on.

    Raises:
        RRError: the folder cannot be written.
    """

    def __init__(self, log_dir: str | Path, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.log_dir = Path(log_dir)
        make_folder(self.log_dir)
        self._writer = SummaryWriter(str(self.log_dir), purge_step=purge_step)
        self._last: dict[str, dict[str, Any]] = {}

    def log_scalar(self, tag: str, value: float, step: int) -> None:
        """Log one number, for example `log_scalar("train/loss/total", 2.3, 100)`. NaN is logged, and null in JSON."""
        value = float(value)
        self._writer.add_scalar(tag, value, step)
        self._last[tag] = {"value": value if math.isfinite(value) else None, "step": step}

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Log a text (Markdown)."""
        self._writer.add_text(tag, text, step)

    def save_checkpoint_metrics(self, path: str | Path, **more: Any) -> Path:
        """Write `metrics.json` into a checkpoint folder: the last value and step of every scalar, and `more`.

        Returns:
            The file's path.
        """
        file = Path(path) / METRICS
        write_json(file, finite({"schema": 1, **more, "scalars": self._last}))
        return file

    def flush(self) -> None:
        """Write out what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()

    def __enter__(self) -> MetricsTracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
