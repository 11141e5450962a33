"""Give a pretrained causal language model a second thought, and find out honestly whether it helped.

The public API is imported on first use, so that `import rrcli` loads neither torch nor pandas.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Packages that say what nobody who runs rr can act on, some of them as soon as they are imported: that weights are on
# the meta device (rr says where they lie), that kernels for GPUs, or kernels that rr leaves off, cannot be loaded.
for _name in ("accelerate.big_modeling", "bitsandbytes.backends.cpu.ops", "torch.utils._pytree", "torchao"):
    logging.getLogger(_name).setLevel(logging.ERROR)

if TYPE_CHECKING:
    from rrcli.evaluation.decoding import StopStrings
    from rrcli.evaluation.evaluate import evaluate_model
    from rrcli.models.loading import load
    from rrcli.notebook import compare, curves, results, samples
    from rrcli.recursion.chunked_decoding import ChunkedDecoding
    from rrcli.recursion.config import RecursionConfig
    from rrcli.recursion.engine import Recursion, attach
    from rrcli.recursion.exits import ExitRule
    from rrcli.tracker import MetricsTracker

_HOMES = {
    "ChunkedDecoding": "rrcli.recursion.chunked_decoding",
    "ExitRule": "rrcli.recursion.exits",
    "MetricsTracker": "rrcli.tracker",
    "Recursion": "rrcli.recursion.engine",
    "RecursionConfig": "rrcli.recursion.config",
    "StopStrings": "rrcli.evaluation.decoding",
    "attach": "rrcli.recursion.engine",
    "compare": "rrcli.notebook",
    "curves": "rrcli.notebook",
    "evaluate_model": "rrcli.evaluation.evaluate",
    "load": "rrcli.models.loading",
    "results": "rrcli.notebook",
    "samples": "rrcli.notebook",
}

__all__ = [
    "ChunkedDecoding",
    "ExitRule",
    "MetricsTracker",
    "Recursion",
    "RecursionConfig",
    "StopStrings",
    "attach",
    "compare",
    "curves",
    "evaluate_model",
    "load",
    "results",
    "samples",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rrcli' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
