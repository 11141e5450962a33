"""The one rule that keeps training, validation and test apart.

On which side a text or a problem is, a hash of what is new about it says (see `novelty`). The rule needs no list, no
seed and no file that could go missing. Everything that reads data filters with it, so no text and no problem, and no
near-twin of one, is ever on two sides.

- `train`: what weights are learned from; also solved examples in prompts.
- `validation`: what choices are made with: measurements during training, the best checkpoint, thresholds.
- `test`: what `rr eval` reports.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from rrcli.data.novelty import novelty

Side = Literal["train", "validation", "test"]

# Names this rule in checkpoints and results: what was made under another one has other sides.
SPLIT_RULE = "novelty-1"
# How messages call the sides.
SIDE_NAMES: dict[Side, str] = {"train": "training", "validation": "validation", "test": "test"}
# Of the 256 values of the hash's first byte, how many belong to test, and how many to validation.
TEST_BYTES, VALIDATION_BYTES = 26, 13
TEST_SHARE, VALIDATION_SHARE = TEST_BYTES / 256, VALIDATION_BYTES / 256


def content_hash(text: str) -> str:
    """Return the SHA-256 of `text` (UTF-8) in hexadecimal: the identity by which records are paired."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def side_of(text: str) -> Side:
    """Return the side that `text` is on: about one in ten is test, one in twenty validation, the rest training."""
    first = int(content_hash(novelty(text))[:2], 16)
    if first < TEST_BYTES:
        return "test"
    return "validation" if first < TEST_BYTES + VALIDATION_BYTES else "train"
