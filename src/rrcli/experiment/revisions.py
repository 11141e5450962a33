"""Notice that the branch of a base model on the hub has moved since the experiment began. Loads no torch.

What `rr surgery` and `rr train` made stays with the commit that its manifest names. `--model org/name` means the newest
commit of a branch though, so that a baseline that is measured again would be of another model.
"""

from __future__ import annotations

from rrcli.errors import RRError
from rrcli.experiment.workspace import Workspace
from rrcli.files import MANIFEST, read_json
from rrcli.models.manifest import read_manifest
from rrcli.schemas import MeasuredModel, Results

# How much of a commit's hash is shown: as much as git shows.
SHOWN = 7


def moved(workspace: Workspace) -> str:
    """Say from where to where the base model's branch has moved since surgery, or the first baseline; '' if it has not.

    Raises:
        RRError: the base model cannot be found, or what has recorded its commit cannot be read.
    """
    base = workspace.base()
    name, _, revision = base.name.partition("@")
    if not base.commit or revision == base.commit:
        return ""
    recorded = _recorded(workspace, base.name)
    if recorded in ("", base.commit):
        return ""
    return (
        f"{revision or 'the main branch'} of {name} has moved from {recorded[:SHOWN]} to {base.commit[:SHOWN]} since "
        f"this experiment began; --model {name}@{recorded} stays with what it began with"
    )


def _recorded(workspace: Workspace, name: str) -> str:
    """Return the commit of the model of this name that the experiment has recorded; '' if none.

    Raises:
        RRError: the record cannot be read, so that nobody knows.
    """
    manifest, results = workspace.surgery_folder / MANIFEST, workspace.results_file("baseline")
    file = manifest if manifest.is_file() else results
    if not file.is_file():
        return ""
    try:
        if file == manifest:
            base = read_manifest(workspace.surgery_folder)["base"]
            return str(base.get("commit", "")) if base["source"] == name else ""
        model: MeasuredModel = read_json(results, "rr eval", Results)["model"]
    except RRError as error:
        raise RRError(
            f"the commit of {name} with which this experiment began cannot be read: {error.message}",
            f"Remove {file} to take today's, or name the commit: --model {name.partition('@')[0]}@COMMIT.",
        ) from error
    return str(model.get("commit", "")) if model.get("source") == name else ""
