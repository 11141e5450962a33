"""Data sets of the hub, read by the library `datasets`: what a name means, which splits there are, and their rows.

A data set is written `hf://NAME[@REVISION][:CONFIG[:SPLIT]]`. NAME is owner/name, or a local folder that begins with
`/` or `.`. A REVISION is a branch, a tag or a commit.

Without a connection (`HF_HUB_OFFLINE=1`) a data set is read from what `datasets` has prepared before, else from the
hub's cache of files, which `datasets` itself does not look at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrcli.errors import RRError, UsageError

HUB = "hf://"
FORM = f"{HUB}NAME[:CONFIG[:SPLIT]]"
# How much is shown of what the library says.
SHOWN = 240


@dataclass(frozen=True)
class HubName:
    """What a name such as `hf://openai/gsm8k:main:test` means.

    Attributes:
        spec: as it was written. split: '' where none is named.
    """

    spec: str
    name: str
    revision: str
    config: str
    split: str

    @property
    def is_folder(self) -> bool:
        """Whether it is a local folder."""
        return self.name.startswith((".", "/"))


def hub_name(spec: str) -> HubName:
    """Return the parts of a name.

    Raises:
        UsageError: it has another form.
    """
    name, _, rest = spec.removeprefix(HUB).partition(":")
    config, _, split = rest.partition(":")
    revision = ""
    if not name.startswith((".", "/")):
        name, _, revision = name.partition("@")
    if not name or ":" in split:
        raise UsageError(f"the data {spec} cannot be read", f"Write {FORM}.")
    return HubName(spec, name, revision, config, split)


def hub_splits(source: HubName, directory: Path) -> list[str]:
    """Return the names of a data set's splits.

    Raises:
        UsageError: the extra `datasets` is not installed. RRError: the data set cannot be read.
    """
    with _named(source.spec):
        return list(_load(dataclasses.replace(source, split=""), directory, streaming=True))


def hub_entries(source: HubName, directory: Path, *, streaming: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split; of `train` where none is named.

    Args:
        streaming: fetch rows as they are needed. Otherwise `datasets` keeps a copy, which is there without a connection
            too.

    Raises:
        UsageError: the extra `datasets` is not installed. RRError: the data set cannot be read; names the row.
    """
    row = 0
    with _named(source.spec):
        split = source.split or "train"
        entries = iter(_load(dataclasses.replace(source, split=split), directory, streaming=streaming))
    while True:
        with _named(f"{source.spec}, row {row + 1}" if row else source.spec):
            entry = next(entries, None)
        if entry is None:
            return
        row += 1
        yield entry


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Turn what the library raises into an error that names the place."""
    try:
        yield
    except RRError:
        raise
    except Exception as error:  # dozens of kinds: the library's own, httpx's, pyarrow's, fsspec's
        hint = "Check the name, the configuration and the split, and the connection (HF_HUB_OFFLINE forbids it)."
        said = " ".join(str(error).split()) or type(error).__name__
        raise RRError(f"cannot read {where}: {said if len(said) <= SHOWN else said[:SHOWN] + '...'}", hint) from error


def _load(source: HubName, directory: Path, *, streaming: bool) -> Any:
    """Return what `datasets` loads: the rows of the split, or, where none is named, all splits by name."""
    try:
        import datasets
    except ImportError:
        raise UsageError(f"{source.spec} needs the extra 'datasets'", "pip install 'rrcli[datasets]'") from None
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    options = {"split": source.split or None, "streaming": streaming}
    if source.is_folder:  # needs no copy
        folder = str((directory / source.name).resolve())
        return datasets.load_dataset(folder, source.config or None, **options | {"streaming": True})
    try:
        return datasets.load_dataset(source.name, source.config or None, revision=source.revision or None, **options)
    except ConnectionError as error:
        if not constants.HF_HUB_OFFLINE:
            raise
        try:
            kept = snapshot_download(
                source.name, repo_type="dataset", revision=source.revision or None, local_files_only=True
            )
        except LocalEntryNotFoundError:
            raise error from None
        return datasets.load_dataset(kept, source.config or None, **options | {"streaming": True})
