"""`rr surgery`: attach a zero-initialised recursion, prove that nothing changed, write the sidecar."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrcli.data.tokens import end_tokens
from rrcli.errors import CheckFailed, RRError, UsageError
from rrcli.experiment.identity import surgery_inputs
from rrcli.experiment.model_card import Card
from rrcli.experiment.replicates import refuse_one_seed
from rrcli.experiment.workspace import SURGERY_STAGE, Workspace
from rrcli.files import METRICS_FILE, SCHEMA, publish_folder, sha256, sweep, write_json
from rrcli.locks import holding, lock
from rrcli.models.export import Content, check_target, fill
from rrcli.models.inspection import inspect_weights
from rrcli.models.loading import load_for, load_tokenizer
from rrcli.models.manifest import read_manifest
from rrcli.models.placement import read_placement
from rrcli.models.saving import save_folder
from rrcli.models.source import ModelSource
from rrcli.models.weights import stamps
from rrcli.recursion.config import RecursionConfig
from rrcli.reporting import Reporter, Silent
from rrcli.settings import SurgerySettings, with_changes
from rrcli.training.launching import launch, launched
from rrcli.training.processes import Processes, join

if TYPE_CHECKING:
    from rrcli.models.costs import Costs


@dataclass(frozen=True)
class SurgeryResult:
    """What surgery did.

    Attributes:
        span: the layers `[start, end)` that are run again. max_steps: the most passes after pass 0.
        base_parameters, added_parameters: counts. base_bytes: size of the base's weight files.
        sidecar_bytes: size of the added weights. bytes_written: size of the folder; 0 in a dry run.
        costs: cache and FLOPs per token at every depth; None where the family cannot be measured.
        verified_depths: the depths whose logits were found equal to the base's, bit for bit; empty if not verified.
        hashed: whether the manifest records the SHA-256 of the base's weight files.
        folder: the folder of the sidecar. export: the self-contained folder. None in a dry run, or if not asked for.
        copied_files: weight files of the export that could not be linked.
    """

    family: str
    layers: int
    span: tuple[int, int]
    max_steps: int
    base_parameters: int
    base_bytes: int
    added_parameters: int
    sidecar_bytes: int
    bytes_written: int
    costs: Costs | None
    verified_depths: list[int]
    hashed: bool
    folder: Path | None
    export: Path | None
    copied_files: int


@holding
def surgery(
    held: ExitStack,
    settings: SurgerySettings,
    directory: Path,
    reporter: Reporter,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    hash_weights: bool = False,
    export: Path | None = None,
) -> SurgeryResult:
    """Attach, verify and publish; the base model's files are only read.

    Args:
        verify: compare the logits with those before surgery. Without that, the weights are never loaded: layout and
            counts come from a skeleton without storage, so that time and memory do not grow with the model.
        hash_weights: record the SHA-256 of every weight file of the base.
        export: also make this self-contained folder; a relative path starts in `directory`.

    Raises:
        RRError: the base is broken or has a recursion, or the output exists or is inside the base model's folder.
        CheckFailed: the logits changed; nothing was written.
    """
    refuse_one_seed(settings, "surgery is made once, with the first of them")
    parallel = read_placement(settings, directory).parallel if verify else None
    if parallel is not None and not launched():
        return launch(
            parallel.processes,
            surgery, settings, directory, reporter,
            overwrite=overwrite, dry_run=dry_run, hash_weights=hash_weights, export=export,
        )  # fmt: skip
    processes = join(settings.device, parallel) if verify else Processes(settings.device)
    reporter = reporter if processes.main else Silent()
    workspace = Workspace(directory, settings)
    folder = workspace.surgery_folder
    export = directory / export.expanduser() if export else None
    base = workspace.base()
    weights = inspect_weights(base.path)
    if base.manifest and base.manifest["recursion"]:
        raise RRError(f"the base model {base.name} has a recursion already", "Operate on the model it was made from.")
    _check_output(folder, base)
    if export is not None and base.is_gguf:
        raise UsageError(
            f"--export needs a model folder, {base.name} is a GGUF file",
            f"'rr export {SURGERY_STAGE} DIR' converts it.",
        )
    if export is not None:
        check_target(export, base, folder, overwrite=overwrite or dry_run)
    targets = [] if dry_run else [folder, *([export] if export is not None else [])]

    def lock_and_sweep() -> None:
        for target in targets:
            held.enter_context(lock(target, str(target)))
            sweep(target.parent, target.name)

    processes.on_main(lock_and_sweep)
    if folder.exists() and not (overwrite or dry_run):
        raise RRError(f"{folder} exists already", "Use --overwrite to replace it.")
    config = settings.recursion
    base_fingerprint = base.fingerprint()
    hashes = processes.decided(lambda: _hash(weights.files, reporter)) if hash_weights and not dry_run else None

    if verify:
        placed = with_changes(settings, device=processes.device)
        model, tokenizer = load_for(placed, base, directory, reporter)
    else:
        from rrcli.models.skeleton import skeleton

        model = skeleton(settings, base, weights.dtype)
        tokenizer = load_tokenizer(base, trust_remote_code=settings.trust_remote_code)
    depths = _operate(model, tokenizer, config, reporter, verify=verify)
    recursion = model.recursion
    costs = _costs(model, reporter)

    def publish() -> tuple[int, int]:
        """Write the folders; return the bytes of the first, and how many files of the second had to be copied."""
        copied = 0
        with ExitStack() as stack:
            target = stack.enter_context(publish_folder(folder, overwrite=overwrite))
            save_folder(
                target, model, tokenizer,
                base=base, directory=directory, base_fingerprint=base_fingerprint, own_weights=False, hashes=hashes,
            )  # fmt: skip
            inputs = surgery_inputs(settings, base_fingerprint)
            times = {"stamps": found} if (found := stamps(base.path)) else {}
            write_json(target / METRICS_FILE, {"schema": SCHEMA, "inputs": inputs, "verified_depths": depths} | times)
            written = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
            if export is not None:
                alone = stack.enter_context(publish_folder(export, overwrite=overwrite))
                card = Card(
                    title=export.name,
                    base=base.name if base.hub else base.path.name,
                    hub_base=base.hub_id,
                    manifest=read_manifest(target),
                    training={},
                )
                ends = end_tokens(model, tokenizer)
                copied = fill(alone, Content(base.path, base.path, target, ends, card.text(), base.hub_id))
        return written, copied

    written, copied = processes.decided(publish) if not dry_run else (0, 0)
    if copied:
        reporter.warn(f"{copied} weight files were copied: hard links from {export} to {base.path} are not possible")
    added = list(recursion.parameters())
    processes.leave()
    return SurgeryResult(
        family=model.config.model_type,
        layers=len(recursion.layers),
        span=(recursion.start, recursion.end),
        max_steps=config.max_steps,
        base_parameters=sum(p.numel() for p in model.parameters()),
        base_bytes=weights.size,
        added_parameters=sum(p.numel() for p in added),
        sidecar_bytes=sum(p.numel() * p.element_size() for p in added),
        bytes_written=written,
        costs=costs,
        verified_depths=depths,
        hashed=hashes is not None,
        folder=None if dry_run else folder,
        export=None if dry_run else export,
        copied_files=copied,
    )


def _check_output(folder: Path, base: ModelSource) -> None:
    if base.path.is_dir() and folder.resolve().is_relative_to(base.path):
        raise RRError(f"the output {folder} is inside the base model's folder", "Choose another --checkpoint-dir.")


def _hash(files: list[Path], reporter: Reporter) -> dict[str, str]:
    """Return the SHA-256 of every file by its name."""
    total = sum(file.stat().st_size for file in files)
    with reporter.progress("hash", total // 2**20, "MiB") as progress:
        return {file.name: sha256(file, lambda amount: progress.advance(amount // 2**20)) for file in files}


def _operate(model: Any, tokenizer: Any, config: RecursionConfig, reporter: Reporter, *, verify: bool) -> list[int]:
    """Attach the recursion, verify it if asked for, and return the depths that were compared with the base."""
    from rrcli.models.verification import reference
    from rrcli.models.verification import verify as compare
    from rrcli.recursion.engine import attach

    before = reference(model, tokenizer) if verify else []
    recursion = attach(model, config)
    if bool(recursion.cell.w_out.weight.count_nonzero()):
        raise CheckFailed("the cell's output projection is not zero", "This is a bug; please report it.")
    return compare(model, tokenizer, before, reporter=reporter) if verify else []


def _costs(model: Any, reporter: Reporter) -> Costs | None:
    from rrcli.models.costs import measure
    from rrcli.models.footprint import seen

    try:
        return seen(model, measure)
    except RRError as error:
        reporter.warn(f"the costs per token could not be measured: {error.message}")
        return None
