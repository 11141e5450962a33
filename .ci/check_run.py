"""What the README's first command printed and wrote: every stage measured, surgery exact, and the README's finding.

The finding, with the one seed that the command has: recursion is ahead of vanilla by far more than 10 points.

python .ci/check_run.py LOG EXPERIMENT
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

LEAST_GAIN = 10.0  # percentage points; five seeds have +33 (docs/recursion_gain.md)
STAGES = ("baseline", "after_surgery", "finetuned_vanilla", "finetuned_recursive")

log, experiment = Path(sys.argv[1]).read_text(encoding="utf-8"), Path(sys.argv[2])
assert "Surgery preserved the baseline exactly" in " ".join(log.split()), "surgery did not preserve the baseline"
assert not re.search(r"(?i)traceback|futurewarning|deprecat|token by token", log), (
    "there is more than progress on stderr"
)
right = {}
for stage in STAGES:
    metrics = json.loads((experiment / "eval_results" / f"{stage}_results.json").read_text(encoding="utf-8"))["metrics"]
    right[stage] = accuracy = metrics["reasoning_accuracy"]["value"]
    print(f"{stage}: reasoning accuracy {accuracy:.1f} %, perplexity {metrics['perplexity']['value']:.3f}")
    assert accuracy > 0, f"{stage} answers nothing right"
gain = right["finetuned_recursive"] - right["finetuned_vanilla"]
assert gain >= LEAST_GAIN, f"recursion gains {gain:+.1f} points, and the README says much more"
