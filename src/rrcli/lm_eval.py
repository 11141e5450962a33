"""Start lm-evaluation-harness with `rr` among its models.

    python -m rrcli.lm_eval --model rr --model_args run=finetuned_recursive,depth=2 --tasks gsm8k

is lm-eval's own command line. `lm_eval --model rr` will do the same once lm-eval looks up the entry points of its group
`lm_eval.models`, where rrcli has one; version 0.4.13 does not. Importing this module registers the model from Python.
"""

from __future__ import annotations

import lm_eval.models  # noqa: F401 - fills the registry with lm-eval's own models
from lm_eval.api.registry import model_registry

NAME, TARGET = "rr", "rrcli.experiment.lm_eval_model:RRModel"

if NAME not in model_registry:
    model_registry.register(NAME, target=TARGET)

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
