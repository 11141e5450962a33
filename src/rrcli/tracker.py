"""`MetricsTracker`: the one writer of TensorBoard events, which also tells other trackers."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rrcli.errors import first_line
from rrcli.files import METRICS_FILE, finite, make_folder, read_json, write_json
from rrcli.other_trackers import OtherTracker
from rrcli.schemas import CheckpointMetrics

# TensorBoard's CUSTOM SCALARS tab: category -> chart -> regular expressions of the tags that it draws. Every run writes
# it, and TensorBoard shows one chart of all runs, so vanilla and recursive lie over each other.
LAYOUT = {
    "Losses": {
        "total": ["train/loss/total"],
        "final_ce": ["train/loss/final_ce"],
        "every loss": ["train/loss/.*"],
    },
    "Generation": {
        "avg_refine_steps": ["train/generation/avg_refine_steps"],
        "commit_rate": ["train/generation/commit_rate"],
        "avg_chunk_length": ["train/generation/avg_chunk_length"],
    },
    "Performance": {
        "tokens_per_sec": ["train/performance/tokens_per_sec"],
        "memory_mb": ["train/performance/memory_mb"],
    },
    "Evaluation": {
        "perplexity": ["evaluation/[^/]*/perplexity"],
        "token accuracy": ["evaluation/[^/]*/token_accuracy"],
        "reasoning accuracy": ["evaluation/[^/]*/reasoning_accuracy"],
    },
    "Depth": {
        "cross-entropy of each pass": ["train/depth_ce/.*"],
        "strength of the feedback": ["train/feedback_norm"],
        "perplexity by depth (x: depth)": ["depth/perplexity"],
        "reasoning accuracy by depth (x: depth)": ["depth/reasoning_accuracy"],
    },
}

# What `rr eval` logs of every stage as `final/<metric>`; the HPARAMS tab shows it beside a run's settings.
SUMMARY = (
    "perplexity",
    "token_accuracy",
    "reasoning_accuracy",
    "relevance",
    "decode_tokens_per_sec",
    "decode_flops_per_token",
)


# What must at least fit on the disk for a log to be begun: more than the first events.
PROBE_BYTES = 2**14
# The part of a run that `rr eval` logs; what logs it again replaces it.
EVALUATION = "evaluation"
# The part that `rr costs` logs.
COSTS = "costs"


class MetricsTracker:
    """Writes scalars, texts, pictures, histograms and hyper-parameters of one run for TensorBoard.

    The last value of every scalar is kept, for `metrics.json`. Logs are not worth losing a training or an evaluation:
    what cannot be written, for example because the disk is full, is warned about once and left out.

    Args:
        log_dir: the run's folder, for example `logs/finetuned_recursive`; None to log nothing, which is for all but
            the main one of a training's processes.
        purge_step: when a run is resumed, the step from which TensorBoard drops what an earlier process logged.
        part: the part of the run that is logged, for example EVALUATION. It has event files of its own: if the tracker
            is left without an error, they replace those that logged the same part before; else they are removed.
        others: trackers that get the same scalars and hyper-parameters (see `other_trackers`).
        warn: is told what cannot be written.

    Raises:
        RRError: the folder cannot be made.
    """

    def __init__(
        self,
        log_dir: str | Path | None,
        purge_step: int | None = None,
        *,
        part: str = "",
        others: Sequence[OtherTracker] = (),
        warn: Callable[[str], object] = warnings.warn,
    ) -> None:
        self._last: dict[str, dict[str, Any]] = {}
        self._writer: Any = _Nowhere()
        self._part, self._others, self._warn = part, others, warn
        self._earlier: set[Path] = set()
        self._error: Exception | None = None
        self._told = False
        if log_dir is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        from rrcli.upstream import guard_events

        self.log_dir = Path(log_dir)
        make_folder(self.log_dir)
        self._earlier = self._files()
        try:
            with tempfile.TemporaryFile(dir=self.log_dir) as probe:  # the writer's thread could only print its error
                probe.write(bytes(PROBE_BYTES))
            suffix = f".{part}" if part else ""
            self._writer = SummaryWriter(str(self.log_dir), purge_step=purge_step, filename_suffix=suffix)
        except OSError as error:
            self._failed(error)
            self._tell()
            return
        guard_events(self._writer, self._failed)
        self._writer.add_custom_scalars({k: {c: ["Multiline", t] for c, t in v.items()} for k, v in LAYOUT.items()})

    def log_scalar(self, tag: str, value: float, step: int) -> None:
        """Log a number, for example `log_scalar("train/loss/total", 2.3, 100)`. NaN becomes null in `metrics.json`."""
        value = float(value)
        self._writer.add_scalar(tag, value, step)
        for other in self._others:
            other.log(tag, value, step)
        self._last[tag] = {"value": value if math.isfinite(value) else None, "step": step}
        self._tell()

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Log a text (Markdown)."""
        self._writer.add_text(tag, text, step)

    def log_image(self, tag: str, image: Any, step: int) -> None:
        """Log a picture, a `uint8` array `[height, width, 3]`."""
        self._writer.add_image(tag, image, step, dataformats="HWC")

    def save_checkpoint_metrics(self, path: str | Path, **more: Any) -> Path:
        """Write `metrics.json` into a checkpoint folder: the last value and step of every scalar, and `more`.

        Returns:
            The file's path.
        """
        file = Path(path) / METRICS_FILE
        write_json(file, finite({"schema": 1, **more, "scalars": self._last}))
        return file

    def restore(self, path: str | Path) -> None:
        """Remember the last values that a checkpoint's `metrics.json` holds, of tags that are not logged again too."""
        saved = read_json(Path(path) / METRICS_FILE, "rr train", CheckpointMetrics).get("scalars", {})
        self._last = {tag: dict(scalar) for tag, scalar in saved.items()} | self._last

    def log_histograms(self, tensors: Mapping[str, Any], step: int) -> None:
        """Log the distribution of each tensor's values under its tag; empty and non-finite ones are left out."""
        for tag, tensor in tensors.items():
            if tensor.numel() and bool(tensor.isfinite().all()):
                self._writer.add_histogram(tag, tensor.detach().float().cpu(), step)

    def log_hparams(self, values: Mapping[str, Any], metrics: Iterable[str]) -> None:
        """Log hyper-parameters for TensorBoard's HPARAMS tab, in this run itself; torch's own function makes a new run.

        Args:
            metrics: tags of scalars to show beside them; the tab reads their last values from the run.
        """
        from rrcli.upstream import add_hparams

        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in values.items()}
        if not isinstance(self._writer, _Nowhere):
            add_hparams(self._writer, plain, dict.fromkeys(metrics, 0.0))
        for other in self._others:
            other.configure(plain)

    def flush(self) -> None:
        """Write everything that is buffered to disk."""
        self._writer.flush()
        self._tell()

    def close(self) -> None:
        """Flush and close the event file, and end the runs of other trackers."""
        self._writer.close()
        self._tell()
        for other in self._others:
            other.close()

    def __enter__(self) -> MetricsTracker:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close()
        if self._part and not isinstance(self._writer, _Nowhere):
            mine = self._files() - self._earlier
            for file in self._earlier if kind is None else mine:
                file.unlink(missing_ok=True)

    def _files(self) -> set[Path]:
        """Return the event files of this part of the run."""
        return set(self.log_dir.glob(f"events.out.tfevents.*.{self._part}")) if self._part else set()

    def _failed(self, error: Exception) -> None:
        """Remember an error of writing; also called by the writer's own thread."""
        self._error = error

    def _tell(self) -> None:
        """Warn of an error of writing, once."""
        if self._error is None or self._told:
            return
        self._told = True
        why = getattr(self._error, "strerror", None) or first_line(self._error)
        self._warn(f"TensorBoard's log in {self.log_dir} is incomplete: {why}")


class _Nowhere:
    """A writer that ignores every call."""

    def __getattr__(self, name: str) -> _Nowhere:
        return self

    def __call__(self, *_: Any, **__: Any) -> _Nowhere:
        return self
