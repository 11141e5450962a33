"""`rr` as a model of lm-evaluation-harness: `--model rr --model_args run=finetuned_recursive,depth=2`.

The numbers are those of `rr eval --harness` for the same tasks. `rrcli.lm_eval` starts lm-eval with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rrcli import configuration
from rrcli.errors import UsageError
from rrcli.evaluation.generation_settings import followed_settings
from rrcli.evaluation.harness_model import HarnessModel
from rrcli.experiment.exporting import source_named
from rrcli.experiment.workspace import Workspace
from rrcli.locks import reading
from rrcli.models.loading import load_for
from rrcli.settings import CommonSettings


class RRModel(HarnessModel):
    """A stage, a run or any other model that rr can load, at one depth.

    Args:
        run: a stage (of the first seed, unless `seed` is given), the name of a run, a folder or a hub id.
        dir: the working directory. depth: passes after pass 0; as trained if not given.
        device, dtype, trust_remote_code: as the options of rr of these names, which `rr.toml` and the environment give
            if they are left out here. batch_size: rows of a batch.
        more: further arguments of lm-eval's own model, such as `max_length`.

    Raises:
        UsageError: nothing has that name, or a depth that the model does not have. RRError: it was not made yet.
    """

    def __init__(
        self,
        run: str,
        *,
        dir: str = ".",
        depth: int | None = None,
        seed: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool | None = None,
        batch_size: Any = 1,
        **more: Any,
    ) -> None:
        directory = Path(dir).expanduser().resolve()
        given = {"seed": seed, "device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        settings = configuration.load(CommonSettings, directory, given)
        workspace = Workspace(directory, settings)
        with reading(lambda: source_named(workspace, run)) as source:
            model, tokenizer = load_for(settings, source, directory)
        recursion = getattr(model, "recursion", None)
        if depth and recursion is None:
            raise UsageError(f"depth is {depth}, but {run} has no recursion", "Leave depth out.")
        if depth is not None and recursion is not None:
            recursion.allow(depth)
            recursion.depth = depth
        model.generation_config = followed_settings(model, choosing=True)
        super().__init__(model, tokenizer, batch_size=batch_size, **more)
