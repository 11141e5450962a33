"""Checks that surgery changed nothing: a fresh recursion has to give exactly the results of the baseline.

Every record that both stages have is compared, at every depth: log-probabilities, answers, generations, samples of
lm-eval. A difference ends the experiment, because everything that is trained or claimed after it would rest on a model
that surgery changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rrcli.comparison.records import PARTS
from rrcli.comparison.results import Results
from rrcli.errors import CheckFailed

# A change of log-probabilities up to this is rounding (another device, another order of sums), in nats per token.
ROUNDING = 1e-3
# Settings that change what is measured, even with the same model.
MEASURING_SETTINGS = (
    *("max_length", "stride", "max_new_tokens", "chat_template", "num_fewshot", "stop", "prompts", "harness"),
)
# What may change the last digits of the numbers.
ROUNDING_CAUSES = ("dtype", "device", "hardware", "machine", "versions")


@dataclass(frozen=True)
class Preservation:
    """The result of comparing the stage after surgery with the baseline.

    Attributes:
        same, changed: in words, how many records of each kind are identical, and how many are not.
        worst: the largest change of a document's mean log-probability, in nats per token.
        causes: other differences between the two measurements that may have changed the last digits.
        unlike: settings or kinds of records in which the two differ, so that their records cannot be compared.
    """

    same: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    worst: float = 0.0
    causes: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """Whether there were records that could be compared."""
        return bool(self.same or self.changed) and not self.unlike

    @property
    def exact(self) -> bool:
        """Whether every record in both stages is identical."""
        return self.known and not self.changed

    @property
    def rounded(self) -> bool:
        """Whether only log-probabilities changed, and by no more than `ROUNDING`."""
        only_documents = len(self.changed) == 1 and self.changed[0].endswith(PARTS["documents"].outcomes)
        return self.known and only_documents and self.worst <= ROUNDING

    @property
    def broken(self) -> bool:
        """Whether surgery changed the model."""
        return self.known and not self.exact and not self.rounded

    def sentence(self) -> str:
        """Return what was found, in words."""
        kept, changed = _listed(self.same), _listed(self.changed)
        if self.unlike:
            return (
                "It is not known whether surgery preserved the baseline: the two stages were measured with different "
                f"{_listed(self.unlike)}."
            )
        if not self.known:
            return "It is not known whether surgery preserved the baseline: the two stages have no record in common."
        if self.exact:
            return f"Surgery preserved the baseline exactly: {kept} are identical."
        rest = f"; {kept} are identical" if kept else ""
        if self.rounded:
            return (
                f"Surgery did NOT preserve the baseline exactly: {changed} differ, but by no more than "
                f"{self.worst:.2g} nats per token, which is rounding{rest}."
            )
        size = f" (log-probabilities by up to {self.worst:.2g} nats per token)" if self.worst else ""
        return f"Surgery did NOT preserve the baseline: {changed} differ{size}{rest}."

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        verdict = next((name for name in ("exact", "rounded", "broken") if getattr(self, name)), "unknown")
        return {"verdict": verdict, **vars(self), "sentence": self.sentence()}


def check_preserved(after: Results, base: Results) -> Preservation:
    """Compare every record of the stage after surgery, at every depth, with the baseline's record of the same key."""
    unlike = [name for name in MEASURING_SETTINGS if _differ(after.get("settings", {}), base.get("settings", {}), name)]
    causes = tuple(name for name in ROUNDING_CAUSES if _differ(after["provenance"], base["provenance"], name))
    same, changed, worst = [], [], 0.0
    for name, part in PARTS.items():
        before = {part.key(record): record for record in base["records"].get(name, ())}
        pairs = [(r, before[part.key(r)]) for r in after["records"].get(name, ()) if part.key(r) in before]
        if not pairs:
            continue
        if any(a.get(field) != b.get(field) for a, b in pairs for field in part.identity):
            unlike.append(name)  # another tokenizer, or other problems under the same keys
            continue
        equal = [all(value == part.outcome(b)[-1] for value in part.outcome(a)) for a, b in pairs]
        if all(equal):
            same.append(f"{len(pairs)} {part.outcomes}")
            continue
        changed.append(f"{equal.count(False)} of {len(pairs)} {part.outcomes}")
        if name == "documents":
            worst = max(abs(nats - b["nll"][-1]) / max(1, b["tokens"]) for a, b in pairs for nats in a["nll"])
    return Preservation(tuple(same), tuple(changed), worst, causes, tuple(unlike))


def require_preserved(found: Preservation | None) -> None:
    """Stop the command if surgery changed the model.

    Raises:
        CheckFailed: surgery did not preserve the baseline.
    """
    if found is None or not found.broken:
        return
    hint = "Results that rest on this surgery say nothing about recursion. "
    if found.causes:
        hint += f"The two stages were measured with different {_listed(found.causes)}: measure the baseline again too."
    else:
        hint += "'rr setup' checks the installation; 'rr surgery --overwrite' repeats the surgery."
    raise CheckFailed(found.sentence(), hint)


def _listed(names: Sequence[str]) -> str:
    """Return names as a list in a sentence: `a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _differ(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> bool:
    # A value that an older version did not record is not known to differ.
    return a.get(name) != b.get(name) and None not in (a.get(name), b.get(name))
