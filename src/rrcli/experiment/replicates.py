"""Replicates: a stage that is trained is trained once with every seed of the experiment. Loads no torch.

Each has folders and files of its own, named after it. Those of the first seed have the plain names, so that an
experiment with one seed becomes one with several without anything being made again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rrcli.errors import UsageError
from rrcli.settings import STAGES, CommonSettings

RECURSIVE_STAGE = "finetuned_recursive"
EQUAL_FLOPS_STAGE = "vanilla_equal_flops"
# Stage -> the mode of its training.
TRAINED = {"finetuned_vanilla": "vanilla", RECURSIVE_STAGE: "recursive", EQUAL_FLOPS_STAGE: "vanilla"}


@dataclass(frozen=True, order=True)
class Replicate:
    """A stage as it is made with one seed; baseline and surgery are made once, with the first seed.

    Attributes:
        first: whether the seed is the first one of the experiment.
    """

    stage: str
    seed: int
    first: bool = True

    @property
    def name(self) -> str:
        """The name of its folders and files: `finetuned_recursive`, or `finetuned_recursive-seed1`."""
        return self.stage if self.first else f"{self.stage}-seed{self.seed}"

    @property
    def flag(self) -> str:
        """The option that names its seed on the command line, after a space; nothing for the first seed."""
        return "" if self.first else f" --seed {self.seed}"


def replicates(stage: str, settings: CommonSettings) -> tuple[Replicate, ...]:
    """Return the replicates that an experiment has of a stage: one for each seed where it is trained, else one."""
    first, *others = settings.all_seeds
    repeated = others if stage in TRAINED else []
    return Replicate(stage, first), *(Replicate(stage, seed, first=False) for seed in repeated)


def replicate(stage: str, settings: CommonSettings) -> Replicate:
    """Return the replicate of a stage that `settings.seed` means."""
    found = replicates(stage, settings)
    return next((one for one in found if one.seed == settings.seed), found[0])


def evaluated_seeds(stage: str, settings: CommonSettings) -> tuple[int, ...]:
    """Return the seeds whose problems a stage is evaluated on: its own where it is trained, else all of them."""
    return (settings.seed,) if stage in TRAINED else settings.all_seeds


def refuse_one_seed(settings: CommonSettings, what: str) -> None:
    """Refuse a seed other than the experiment's first one for `what` is not done for one seed alone.

    Raises:
        UsageError: the settings have such a seed.
    """
    if settings.seed != settings.all_seeds[0]:
        listed = ", ".join(map(str, settings.all_seeds))
        raise UsageError(
            f"seed is {settings.seed}, but the experiment has the seeds {listed}, and {what}",
            f"Here seed is the first of them, {settings.all_seeds[0]}; rr train, rr eval and rr generate take any.",
        )


def reserved(name: str) -> bool:
    """Tell whether a name is that of a stage or a replicate, in any case: some file systems do not tell cases apart."""
    return re.fullmatch(rf"({'|'.join(STAGES)})(-seed\d+)?", name.casefold()) is not None
