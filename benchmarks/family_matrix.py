"""Hold every property against every family and write the table in docs/families.md.

    python benchmarks/family_matrix.py [--out FILE] [FAMILY ...]

The models are tiny and random, the same as in the tests; see tests/tiny_configs.py. With families named, the table is
printed only. Exits with 1 if a property does not hold.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from families import CONDITIONING, ROUNDING, Findings, examine  # noqa: E402
from rrcli.recursion.families import LAYOUTS, REFUSED  # noqa: E402

INTRO = """# Model families

Written by `python benchmarks/family_matrix.py` (transformers {transformers}, torch {torch}, fp32, CPU) on tiny random
models with 4 layers, a full and a partial span, every depth from 0 to 2.

- **exact**: a zero-initialised recursion gives the base model's logits bit for bit, cached and uncached, and the same
  generated tokens; depth 0 stays exact with a trained cell.
- **cached = uncached**: the largest difference of the logits with a trained cell, relative to the largest logit. It
  must be below {rounding:g}, or below {conditioning} times the difference that a change in the last place of the
  embeddings makes; that limit then stands beside it.
- **causal**: changing a token leaves the logits before it untouched.
- **generate**: greedy generation with a trained cell is the argmax of the uncached logits.
- **learns**: one backward pass reaches the output projection.
- **in batches**: prompts of different lengths, decoded together, get the tokens that each gets alone, from the stock
  model and from a trained cell. `padded` families do so in one batch, padded on the left. With `equal lengths` the
  stock model itself writes other tokens next to padding; `rr` then lets only prompts of one length share a batch.
- **in chunks**: chunked decoding writes the tokens of running every pass for every token, for single prompts and for
  batches. `no` means that the family cannot take several tokens at once after a cache, or that its cache cannot be
  taken back: it is decoded token by token, with a notice.

The weights are drawn with standard deviation 0.1. bamba and minimax were told their positions.
"""
REFUSALS = """
## Refused

These families are refused with a message when a recursion is attached; nothing runs wrong.

| family | reason |
|---|---|
"""
UNKNOWN = """
A model with `num_kv_shared_layers` above 0 (the small Gemma 4 models) is refused too: its last layers read the keys and
values of earlier ones. Any family that is in neither table is looked for by structure and has to prove itself when a
recursion is attached: its layers run once each in order on `[batch, position, hidden]`, it is causal, and running its
layers again gives, with and without a cache, what the stock model gives for the same input. Otherwise it is refused.
"""
# The ways to decode that the last two columns are about.
KINDS = ("batches", "chunks")


def row(family: str, found: Findings) -> str:
    """Return one line of the table."""
    marks = [found.exact, None, found.causal, found.generates, found.learns]
    limit = f" (limit {found.limit:.1e})" if found.cached >= ROUNDING else ""
    cells = [f"{found.cached:.1e}{limit}" if mark is None else "yes" if mark else "**no**" for mark in marks]
    wrong = {kind: any(fault.startswith("chunks") == (kind == "chunks") for fault in found.faults) for kind in KINDS}
    cells.append("**wrong**" if wrong["batches"] else "padded" if found.padding else "equal lengths")
    cells.append("**wrong**" if wrong["chunks"] else "yes" if found.blocks else "no")
    return f"| {family} | {' | '.join(cells)} |"


def main() -> int:
    """Examine, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="only these, and write nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "families.md")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other
    names = options.families or sorted(LAYOUTS)
    found = {}
    for name in names:
        found[name] = examine(name)
        print(f"{len(found)}/{len(names)} {name}", *found[name].faults, sep="\n    ", file=sys.stderr)
    columns = ("family", "exact", "cached = uncached", "causal", "generate", "learns", "in batches", "in chunks")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    table = "\n".join([*lines, *(row(name, findings) for name, findings in found.items())])
    print(table)
    if not options.families:
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        refused = "\n".join(f"| {name} | {reason} |" for name, reason in sorted(REFUSED.items()))
        intro = INTRO.format(**versions, rounding=ROUNDING, conditioning=CONDITIONING)
        heading = f"\n## Supported: {len(found)}\n\n"
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(f"{intro}{heading}{table}\n{REFUSALS}{refused}\n{UNKNOWN}", encoding="utf-8")
    return 0 if all(findings.hold for findings in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
