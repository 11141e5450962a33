"""The one rule that keeps training and evaluation apart.

A text or a problem is held out when a hash of its own words says so. The rule needs no list, no seed and no file that
could go missing. Training and evaluation both filter with it, so they never share a text or a problem.
"""

from __future__ import annotations

import hashlib

HELD_OUT_SHARE = 26 / 256


def content_hash(text: str) -> str:
    """Return the SHA-256 of `text` (UTF-8) in hexadecimal: the identity by which records are paired."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def is_held_out(text: str) -> bool:
    """Tell whether `text` belongs to evaluation (about one in ten) rather than to training."""
    return int(content_hash(text)[:2], 16) < 26
