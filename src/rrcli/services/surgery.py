"""`rr surgery`: attach a zero-initialised recursion, prove that nothing changed, write the sidecar."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrcli.errors import CheckFailed, RRError
from rrcli.models import load_for, save_folder
from rrcli.recursion.config import RecursionConfig, parse_span
from rrcli.reporting import Reporter
from rrcli.settings import SurgerySettings
from rrcli.store import publish_folder, sweep, write_json
from rrcli.workspace import Workspace, surgery_inputs

PROBES = ("The quick brown fox jumps over the lazy dog.", "Question: 2 + 3 =\nAnswer:")


@dataclass(frozen=True)
class SurgeryResult:
    """What surgery did.

    Attributes:
        added_parameters, base_parameters: counts. sidecar_bytes: size of the added weights.
        verified_depths: the depths whose logits were found equal to the base's, bit for bit; empty if not verified.
        folder: where the sidecar lies; None for a dry run.
    """

    family: str
    layers: int
    span: tuple[int, int]
    max_steps: int
    added_parameters: int
    base_parameters: int
    sidecar_bytes: int
    verified_depths: list[int]
    folder: Path | None


def surgery(
    settings: SurgerySettings,
    directory: Path,
    reporter: Reporter,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    verify: bool = True,
) -> SurgeryResult:
    """Attach, verify and publish; the base model's files are only read.

    Raises:
        RRError: the output exists, or lies inside the base model's folder. CheckFailed: the logits changed.
    """
    workspace = Workspace(directory, settings)
    folder = workspace.surgery_folder
    base = workspace.base()
    if base.path.is_dir() and folder.resolve().is_relative_to(base.path):
        raise RRError(f"the output {folder} lies inside the base model's folder", "Choose another --checkpoint-dir.")
    if folder.parent.is_dir():
        sweep(folder.parent)
    if folder.exists() and not overwrite and not dry_run:
        raise RRError(f"{folder} exists already", "Use --overwrite to replace it.")
    config = surgery_config(settings)
    base_fingerprint = base.fingerprint()

    from rrcli.recursion.engine import attach

    model, tokenizer = load_for(settings, base, directory)
    if getattr(model, "recursion", None) is not None:
        raise RRError(f"the base model {base.name} has a recursion already", "Operate on the model it was made from.")
    recursion = attach(model, config)
    depths = _verify(model, tokenizer, reporter) if verify else []
    if bool(recursion.cell.w_out.weight.count_nonzero()):
        raise CheckFailed("the cell's output projection is not zero", "This is a bug; please report it.")
    parameters = list(recursion.parameters())
    result = SurgeryResult(
        family=model.config.model_type,
        layers=len(recursion.layers),
        span=(recursion.start, recursion.end),
        max_steps=config.max_steps,
        added_parameters=sum(p.numel() for p in parameters),
        base_parameters=sum(p.numel() for p in model.parameters()),
        sidecar_bytes=sum(p.numel() * p.element_size() for p in parameters),
        verified_depths=depths,
        folder=None if dry_run else folder,
    )
    if not dry_run:
        with publish_folder(folder, overwrite=overwrite) as temporary:
            save_folder(temporary, model, tokenizer, base, base_fingerprint, own_weights=False)
            inputs = surgery_inputs(settings, base_fingerprint)
            write_json(temporary / "metrics.json", {"schema": 1, "inputs": inputs, "verified_depths": depths})
    return result


def surgery_config(settings: SurgerySettings) -> RecursionConfig:
    """Return the recursion that the settings describe."""
    return RecursionConfig(
        max_steps=settings.max_steps,
        span=parse_span(settings.span),
        cell_width=settings.cell_width or None,
        chunk_width=settings.chunk_width,
        seed=settings.seed,
    )


def _verify(model: Any, tokenizer: Any, reporter: Reporter) -> list[int]:
    import torch

    recursion = model.recursion
    depths = list(range(recursion.config.max_steps + 1))
    with torch.no_grad(), reporter.progress("verify", len(PROBES) * len(depths), "forwards") as progress:
        for probe in PROBES:
            ids = torch.tensor([tokenizer(probe)["input_ids"]], device=model.device)
            with recursion.at_depth(0):
                stock = model(input_ids=ids).logits
            if not torch.isfinite(stock).all():
                raise CheckFailed(
                    f"the base model gives logits that are not finite for {probe!r}", "Check its weights."
                )
            for depth in depths:
                with recursion.at_depth(depth):
                    logits = model(input_ids=ids).logits
                if not torch.equal(logits, stock):
                    worst = float((logits - stock).abs().max())
                    raise CheckFailed(
                        f"surgery changes the model: at depth {depth} logits differ by {worst:.3g} for {probe!r}",
                        "Nothing was written. Try another --dtype, or report the model family.",
                    )
                progress.advance()
    return depths
