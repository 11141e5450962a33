"""`rr export`: make a folder of a run that transformers, lm-eval and peft load by themselves."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rrcli.experiment.exporting import export_to, found
from rrcli.experiment.workspace import Workspace
from rrcli.files import publish_folder, sweep
from rrcli.locks import holding, lock
from rrcli.models.export import check_target
from rrcli.models.weights import ADAPTER_CONFIG, adapter_folder
from rrcli.reporting import Reporter
from rrcli.settings import CommonSettings


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        name: what was asked for. folder: the export. recursive: whether it has a recursion, whose code has to be
            trusted. adapters: where it has LoRA adapters; None if it has none.
        bytes: the size of all its files. copied_files: weight files that could not be linked, and take space.
    """

    name: str
    folder: Path
    recursive: bool
    adapters: Path | None
    bytes: int
    copied_files: int


@holding
def export(
    held: ExitStack,
    settings: CommonSettings,
    name: str,
    target: Path,
    directory: Path,
    reporter: Reporter,
    *,
    overwrite: bool = False,
    merge: bool = False,
    comparison: str = "",
) -> ExportResult:
    """Publish the export of a stage, a run or a checkpoint; it is complete or not there.

    Args:
        name: a stage, the name of a run, or a folder. target: the new folder; a relative one starts in `directory`.
        merge: add the adapters of a model without recursion to its weights.
        comparison: `rr compare` as Markdown, for the model card.

    Raises:
        UsageError: nothing has that name, or adapters that cannot be merged.
        RRError: the target exists, or would destroy something.
    """
    target = directory / target.expanduser()
    made = held.enter_context(found(Workspace(directory, settings), name))
    check_target(target, made.base, made.source.path, overwrite=overwrite)
    held.enter_context(lock(target, str(target)))
    sweep(target.parent, target.name)
    with publish_folder(target, overwrite=overwrite) as folder:
        copied = export_to(folder, made, settings, directory, title=target.name, merge=merge, comparison=comparison)
    if copied:
        reporter.warn(f"{copied} weight files were copied: hard links from {target} to them are not possible")
    return ExportResult(
        name=name,
        folder=target,
        recursive=made.manifest["recursion"] is not None,
        adapters=adapter_folder(target) if (adapter_folder(target) / ADAPTER_CONFIG).is_file() else None,
        bytes=sum(file.stat().st_size for file in target.rglob("*") if file.is_file()),
        copied_files=copied,
    )
