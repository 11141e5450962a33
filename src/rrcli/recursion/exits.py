"""Exit rules: when a position stops being refined.

A rule looks at one position after each pass, from pass 0 on, and the position leaves at the first pass with which the
rule is content; at the last pass it leaves in any case. The token of a position is what the pass says with which it
left. A rule reads the passes of this position so far, and nothing that comes after the position. So the tokens of a
text do not depend on how it is cut into chunks, and known text can be scored with every rule at once.

rule            a position leaves at pass k if ...                                     threshold
head            the boundary head's probability of committing is at least              0 to 1
probability     the most likely token's probability is at least                        0 to 1
margin          it exceeds the second most likely token's probability by at least      0 to 1
unchanged       k >= 1, and the most likely token is that of pass k-1                  none
contraction     k >= 1, and ||h(k) - h(k-1)|| / ||h(k-1)|| is at most                  from 0
depth           k is at least                                                          0, 1, 2, ...
never           never: every pass is run                                               none
random          a draw that knows nothing of the text says so (a control)              none, but shares
oracle          its most likely token is the true one (an upper bound, known text)     none

Importing this loads no torch; `signals` computes what the rules read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from rrcli.errors import UsageError, suggest

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["head", "probability", "margin", "unchanged", "contraction", "depth", "never", "random", "oracle"]
KINDS: tuple[str, ...] = get_args(Kind)
# The greatest threshold of each rule that has one.
GREATEST = {"head": 1.0, "probability": 1.0, "margin": 1.0, "contraction": 1e9, "depth": 64.0}
# The rules that a user can choose for a model.
CHOOSABLE = (*GREATEST, "unchanged")


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What one pass says at some positions. All tensors have the shape of the positions, but for `state`.

    Attributes:
        step: which pass it is; 0 is pass 0.
        prediction: the most likely token. probability: its probability. margin: how much more likely it is than the
            second.
        state: `[..., hidden]` h(step).
        commit: the boundary head's probability of committing.
        unchanged: whether the prediction is that of the pass before; nowhere at pass 0.
        change: ||h(k) - h(k-1)|| / ||h(k-1)||; infinite at pass 0.
        draw: uniform in [0, 1), the same at every pass.
        right: whether the prediction is the true token; None where that is not known.
    """

    step: int
    prediction: Tensor
    probability: Tensor
    margin: Tensor
    state: Tensor
    commit: Tensor
    unchanged: Tensor
    change: Tensor
    draw: Tensor
    right: Tensor | None = None

    def everywhere(self, value: bool) -> Tensor:
        """Return `value` for every position."""
        return self.unchanged.new_full(self.unchanged.shape, value)


@dataclass(frozen=True)
class ExitRule:
    """When a position stops being refined; the table is in the module's docstring.

    Attributes:
        kind: the rule. threshold: its threshold; 0 where it has none.
        shares: of `random` alone: the share of positions that leave at pass 0, 1, ...

    Raises:
        UsageError: an unknown rule, or a threshold that the rule cannot have.
    """

    kind: Kind
    threshold: float = 0.0
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"unknown exit rule '{self.kind}'", suggest(self.kind, KINDS))
        greatest, whole = GREATEST.get(self.kind, 0.0), self.kind == "depth"
        if not 0 <= self.threshold <= greatest or (whole and self.threshold != int(self.threshold)):
            limits = f"It must be a {'whole ' if whole else ''}number from 0 to {greatest:g}."
            raise UsageError(
                f"the threshold of exit rule '{self.kind}' is {self.threshold:g}",
                limits if greatest else "This rule has none.",
            )

    def __str__(self) -> str:
        if self.kind == "never":
            return "none"
        return f"{self.kind}:{self.threshold:g}" if self.kind in GREATEST else self.kind

    @property
    def earliest(self) -> int:
        """The first pass at which a position may leave."""
        if self.kind == "depth":
            return int(self.threshold)
        return 1 if self.kind in ("unchanged", "contraction") else 0

    def leaves(self, seen: Signals) -> Tensor:
        """Tell for each position whether the rule is content with this pass; booleans in the shape of the signals."""
        match self.kind:
            case "head":
                return seen.commit >= self.threshold
            case "probability":
                return seen.probability >= self.threshold
            case "margin":
                return seen.margin >= self.threshold
            case "unchanged":
                return seen.unchanged
            case "contraction":
                return seen.change <= self.threshold
            case "random":
                return seen.draw < sum(self.shares[: seen.step + 1])
            case "oracle":
                assert seen.right is not None, "the oracle needs known text"
                return seen.right
            case _:
                return seen.everywhere(self.kind == "depth" and seen.step >= self.threshold)

    def to_dict(self) -> dict[str, Any]:
        """Return the form in a manifest, which `from_dict` reads back."""
        return {"rule": self.kind, "threshold": self.threshold}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ExitRule:
        """Read the form in a manifest.

        Raises:
            UsageError: the rule cannot be chosen for a model, or cannot have this threshold.
        """
        return _choosable(cls(values["rule"], float(values["threshold"])))


# Every pass is run for every token.
NEVER = ExitRule("never")


def parse_exit(text: str) -> ExitRule:
    """Read RULE:THRESHOLD, RULE where it has no threshold, or 'none' for every pass, as `str` of a rule writes it.

    Raises:
        UsageError: anything else.
    """
    if text == "none":
        return NEVER
    kind, colon, threshold = text.partition(":")
    if kind not in CHOOSABLE:
        raise UsageError(f"unknown exit rule '{kind}'", suggest(kind, (*CHOOSABLE, "none")))
    if bool(colon) != (kind in GREATEST):
        example = {"depth": "1", "contraction": "0.1"}.get(kind, "0.99")
        form = f"--exit {kind}:{example}" if kind in GREATEST else f"--exit {kind}"
        raise UsageError(f"exit rule '{text}' is not understood", f"Write it like {form}.")
    try:
        number = float(threshold) if colon else 0.0
    except ValueError:
        raise UsageError(f"the threshold of exit rule '{text}' is no number") from None
    return ExitRule(kind, number)  # type: ignore[arg-type]


def exit_for(recursion: Any, asked: str, depth: int) -> ExitRule | None:
    """Return the rule by which a model is to be run; None for every pass.

    Args:
        asked: what the user asked for, as `parse_exit` reads it; '' = nothing. depth: the depth that the user asked
            for, at which every pass is run unless a rule is asked for too; -1 = none.

    Raises:
        UsageError: no such rule; or the model has no recursion, or one that cannot leave early.
    """
    rule = parse_exit(asked) if asked else None
    if recursion is None:
        if rule is not None and rule != NEVER:
            raise UsageError(f"the exit is {rule}, but the model has no recursion", "Leave --exit out.")
        return None
    if rule is None:
        rule = NEVER if depth >= 0 else recursion.exit or NEVER
    if rule != NEVER and not recursion.can_exit:
        raise UsageError(
            f"the exit {rule} needs a span that ends with the last layer",
            "Layers follow this span, and only the last pass runs them. --exit none runs every pass.",
        )
    return None if rule == NEVER else rule


def _choosable(rule: ExitRule) -> ExitRule:
    if rule.kind not in CHOOSABLE:
        raise UsageError(f"the exit rule '{rule.kind}' cannot be chosen for a model", suggest(rule.kind, CHOOSABLE))
    return rule
