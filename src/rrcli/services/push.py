"""`rr push`: upload the export of a run to the hub, in one commit: a repository holds the old model or the new one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rrcli import __version__
from rrcli.errors import RRError, UsageError, first_line
from rrcli.experiment.exporting import Made, export_to, found
from rrcli.experiment.workspace import Workspace
from rrcli.files import MANIFEST
from rrcli.reporting import Reporter
from rrcli.settings import CommonSettings

# What an export that was pushed before may have left, and a new one without such a file must not keep.
PARTS = ("*.safetensors", "*.index.json", "*.py", "adapter_config.json", "adapter/*", "custom_generate/*", MANIFEST)
LOG_IN = "Log in with 'hf auth login', and check the name, your rights and the connection."


@dataclass(frozen=True)
class PushResult:
    """What was uploaded.

    Attributes:
        name: what was asked for. repo: the id of the repository. url: its address. commit: the hash of the new commit.
        private: whether this command made it, for its owner alone; None if it was there before.
        files, bytes: of the export.
    """

    name: str
    repo: str
    url: str
    commit: str
    private: bool | None
    files: int
    bytes: int


def push(
    settings: CommonSettings,
    name: str,
    repo: str,
    directory: Path,
    reporter: Reporter,
    *,
    public: bool = False,
    overwrite: bool = False,
    merge: bool = False,
    comparison: str = "",
) -> PushResult:
    """Upload a stage, a run, a checkpoint or an export; a repository that is not there yet is made.

    Args:
        repo: its id, `owner/name`. public: a repository that is made here can be seen by everybody.
        overwrite: upload also into a repository that holds something else than an export of rr.
        merge, comparison: as for an export.

    Raises:
        UsageError: nothing has that name, no id of a repository, or adapters that nobody else could use.
        RRError: the hub refuses, or the repository holds something else.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"'{repo}' is no id of a repository: {first_line(error)}", "Write owner/name.") from error
    with ExitStack() as held:
        made = held.enter_context(found(Workspace(directory, settings), name))
        _refuse_lonely_adapters(made, merge=merge)
        api = HfApi(library_name="rrcli", library_version=__version__)
        with _asking(repo):
            there = api.list_repo_files(repo) if api.repo_exists(repo) else None
        if there and MANIFEST not in there and not overwrite and set(there) - {".gitattributes", "README.md"}:
            raise RRError(
                f"the repository {repo} holds something else than an export of rr", "--overwrite uploads all the same."
            )
        folder = held.enter_context(
            _exported(made, settings, directory, title=repo, merge=merge, comparison=comparison)
        )
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = [file.relative_to(folder).as_posix() for file in files]
        size = sum(file.stat().st_size for file in files)
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in zip(names, files, strict=True)
        ]
        operations += [CommitOperationDelete(path_in_repo=path) for path in _left_over(there or (), names)]
        with _asking(repo), reporter.progress("push", 1, "commits") as progress:
            if there is None:
                api.create_repo(repo, private=not public, exist_ok=True)
            commit = api.create_commit(repo, operations, commit_message=f"{made.name}, exported by rr {__version__}")
            progress.advance()
    url = f"{api.endpoint}/{repo}"
    return PushResult(name, repo, url, commit.oid, None if there is not None else not public, len(files), size)


def _refuse_lonely_adapters(made: Made, *, merge: bool) -> None:
    """Refuse adapters beside weights where the hub's copy would need the base by an id that it does not have.

    Raises:
        UsageError: these are such.
    """
    if made.manifest.get("lora") and not made.manifest["recursion"] and not merge and made.hub_base is None:
        raise UsageError(
            f"the adapters of {made.name} belong to a base that is not on the hub, so nobody else could load them",
            "With --merge they are added to the weights.",
        )


@contextmanager
def _exported(
    made: Made, settings: CommonSettings, directory: Path, *, title: str, merge: bool, comparison: str
) -> Iterator[Path]:
    """Give the folder to upload: an export as it is, of anything else one that is removed at the end."""
    if made.complete and not merge:
        yield made.source.path
        return
    with TemporaryDirectory(prefix=".rr-push-", dir=directory, ignore_cleanup_errors=True) as place:
        folder = Path(place) / "export"
        folder.mkdir()
        export_to(folder, made, settings, directory, title=title, merge=merge, comparison=comparison)
        yield folder


def _left_over(there: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return what an earlier export has left in a repository and the new one does not replace."""
    stale = sorted(set(there) - set(names)) if MANIFEST in there else []
    return [path for path in stale if any(fnmatch(path, part) for part in PARTS)]


@contextmanager
def _asking(repo: str) -> Iterator[None]:
    """Turn what the hub or the connection raises into an error that says what to do."""
    try:
        yield
    except (RRError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise RRError(f"the hub does not take the repository {repo}: {first_line(error)}", LOG_IN) from error
