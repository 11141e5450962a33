"""The founding invariant of an experiment: a fresh recursion changes nothing. Held against the records of two stages.

Every record that both stages hold is compared, at every depth: log-probabilities, answers, generations, samples of
lm-eval. What differs ends the experiment: whatever is trained or claimed afterwards would rest on a broken surgery.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rrcli.comparison.records import PARTS
from rrcli.comparison.results import Results
from rrcli.errors import CheckFailed

# A change of log-probabilities up to this is rounding (another device, another order of sums), in nats per token.
ROUNDING = 1e-3
# Settings that change what is measured, whatever the model.
MEASURING_SETTINGS = (
    *("max_length", "stride", "max_new_tokens", "chat_template", "num_fewshot", "stop", "prompts", "harness"),
)
# What may change the last digits of what is measured.
ROUNDING_CAUSES = ("dtype", "device", "hardware", "machine", "versions")


@dataclass(frozen=True)
class Preservation:
    """What came of holding a stage after surgery against the baseline.

    Attributes:
        same, changed: kinds of records, with their number, that are identical and that are not.
        worst: the largest change of a document's mean log-probability, in nats per token.
        causes: what else differs between the two measurements, and may have changed digits.
        unlike: settings, or kinds of records, in which they differ, so that nothing can be told from their records.
    """

    same: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    worst: float = 0.0
    causes: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """Whether there was anything to compare."""
        return bool(self.same or self.changed) and not self.unlike

    @property
    def exact(self) -> bool:
        """Whether every common record is identical."""
        return self.known and not self.changed

    @property
    def rounded(self) -> bool:
        """Whether nothing changed but log-probabilities, by no more than `ROUNDING`."""
        only_documents = len(self.changed) == 1 and self.changed[0].endswith(PARTS["documents"].outcomes)
        return self.known and only_documents and self.worst <= ROUNDING

    @property
    def broken(self) -> bool:
        """Whether surgery changed the model."""
        return self.known and not self.exact and not self.rounded

    def sentence(self) -> str:
        """Say what was found."""
        kept, changed = ", ".join(self.same), ", ".join(self.changed)
        if self.unlike:
            return (
                "Whether surgery preserved the baseline cannot be told: the two stages were measured with different "
                f"{', '.join(self.unlike)}."
            )
        if not self.known:
            return "Whether surgery preserved the baseline cannot be told: the two stages share no record."
        if self.exact:
            return f"Surgery preserved the baseline exactly: {kept} are identical."
        rest = f"; {kept} are identical" if kept else ""
        if self.rounded:
            return (
                f"Surgery did NOT preserve the baseline exactly, only within {self.worst:.2g} nats per token, which is "
                f"rounding: {changed}{rest}."
            )
        size = f" (by up to {self.worst:.2g} nats per token)" if self.worst else ""
        return f"Surgery did NOT preserve the baseline: {changed} differ{size}{rest}."

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        verdict = next((name for name in ("exact", "rounded", "broken") if getattr(self, name)), "unknown")
        return {"verdict": verdict, **vars(self), "sentence": self.sentence()}


def check_preserved(after: Results, base: Results) -> Preservation:
    """Compare every record of a stage after surgery, at every depth, with the baseline's record of the same key."""
    unlike = [name for name in MEASURING_SETTINGS if _differ(after.get("settings", {}), base.get("settings", {}), name)]
    causes = tuple(name for name in ROUNDING_CAUSES if _differ(after["provenance"], base["provenance"], name))
    same, changed, worst = [], [], 0.0
    for name, part in PARTS.items():
        before = {record["key"]: record for record in base["records"].get(name, ())}
        pairs = [(r, before[r["key"]]) for r in after["records"].get(name, ()) if r["key"] in before]
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
    """Refuse to go on after a broken surgery.

    Raises:
        CheckFailed: it did not preserve the baseline.
    """
    if found is None or not found.broken:
        return
    hint = "Nothing that is trained or compared from here says anything about recursion. "
    if found.causes:
        hint += f"The two were measured with different {', '.join(found.causes)}: measure the baseline again as well."
    else:
        hint += "'rr setup' checks the installation; 'rr surgery --overwrite' makes the surgery anew."
    raise CheckFailed(found.sentence(), hint)


def _differ(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> bool:
    # What an older version did not record is not known to differ.
    return a.get(name) != b.get(name) and None not in (a.get(name), b.get(name))
