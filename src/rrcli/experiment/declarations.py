"""Which claims were declared when: before a fine-tuned stage was first evaluated, or after. Loads no torch.

A claim that is made up after its numbers were seen proves nothing. So the first evaluation of a fine-tuned stage, and
every later one that finds other claims in `rr.toml`, appends them to `declared.json` among the results, with what was
measured already. The file is kept when stages are measured again: their problems have been seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rrcli.experiment.replicates import TRAINED
from rrcli.experiment.workspace import Workspace
from rrcli.files import read_json, write_json
from rrcli.schemas import Declared, DeclaredClaims

FILE = "declared.json"


def record(workspace: Workspace, declared: Mapping[str, Any]) -> None:
    """Append what is declared now, unless it is what was declared last.

    Args:
        declared: `Declaration.texts`.
    """
    entries = _entries(workspace)
    if entries and _claimed(entries[-1]) == _claimed(declared):
        return
    seen = [*(name for entry in entries for name in entry["measured"]), *_measured(workspace)]
    measured = list(dict.fromkeys(seen))
    entry = {**declared, "created": datetime.now(UTC).isoformat(timespec="seconds"), "measured": measured}
    write_json(_file(workspace), {"schema": 1, "kind": "declarations", "declarations": [*entries, entry]})


def late(workspace: Workspace, declared: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each part of what is declared now that came after a fine-tuned stage was measured.

    A claim that was dropped by then is told too: with fewer claims, the level of the others is less strict.
    """
    entries, measured = _entries(workspace), _measured(workspace)
    if not measured or not declared["primary"]:
        return []
    if not entries:
        return [
            "fine-tuned stages were measured before any claim was recorded, so nothing shows that the primary claims "
            "were declared before their numbers were known"
        ]
    said = [
        f"the claim '{claim}' was declared after {', '.join(known)} had been measured: it is exploratory"
        for claim, known in late_claims(workspace, declared).items()
    ]
    before = next((entry for entry in reversed(entries) if not entry["measured"]), entries[0])
    said += [
        f"the claim '{claim}' was declared before a fine-tuned stage had been measured, and was dropped"
        for claim in before["primary"]
        if claim not in declared["primary"]
    ]
    for name, was in (("alpha", before["alpha"]), ("margin", before["margin"])):
        if declared[name] != was:
            said.append(f"{name} was changed after a fine-tuned stage had been measured: it was {was}")
    return said


def late_claims(workspace: Workspace, declared: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the primary claims that came after fine-tuned results, with these; none if nothing was ever recorded."""
    entries, measured = _entries(workspace), _measured(workspace)
    if not entries:
        return {}
    known = {
        claim: next((entry["measured"] for entry in entries if claim in entry["primary"]), measured)
        for claim in declared["primary"]
    }
    return {claim: names for claim, names in known.items() if names}


def recorded(workspace: Workspace, declared: Mapping[str, Any]) -> str:
    """Return when what is declared now was recorded; '' if it was not, or if a fine-tuned stage had been measured."""
    found = (entry for entry in _entries(workspace) if not entry["measured"] and _claimed(entry) == _claimed(declared))
    return next((entry["created"] for entry in found), "")


def _measured(workspace: Workspace) -> list[str]:
    return [one.name for stage in TRAINED for one in workspace.measured(stage)]


def _claimed(declared: Mapping[str, Any]) -> dict[str, Any]:
    return {name: declared[name] for name in ("primary", "margin", "alpha")}


def _entries(workspace: Workspace) -> list[DeclaredClaims]:
    file = _file(workspace)
    return list(read_json(file, "rr eval", Declared)["declarations"]) if file.is_file() else []


def _file(workspace: Workspace) -> Path:
    return workspace.directory / workspace.settings.output_dir / FILE
