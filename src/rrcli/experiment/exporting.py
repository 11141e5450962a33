"""Find what `rr export`, `rr push` and `rr serve` are asked for, and make the folder of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from rrcli.errors import RRError, UsageError, suggest
from rrcli.experiment.model_card import Card
from rrcli.experiment.workspace import Workspace
from rrcli.files import METRICS_FILE, checkpoints, read_json
from rrcli.locks import reading
from rrcli.models.export import CARD, Content, fill
from rrcli.models.inspection import inspect_weights
from rrcli.models.source import ModelSource, base_of, is_hub_id
from rrcli.schemas import CheckpointMetrics
from rrcli.settings import STAGES, CommonSettings


@dataclass(frozen=True)
class Made:
    """What is exported.

    Attributes:
        name: what the user called it. source: the folder that rr wrote. base: the model whose weights it has.
    """

    name: str
    source: ModelSource
    base: ModelSource

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the folder."""
        found = self.source.manifest
        assert found is not None
        return found

    @property
    def training(self) -> dict[str, Any]:
        """What is known of how it was trained; empty where it was not."""
        metrics = self.source.path / METRICS_FILE
        found = read_json(metrics, "rr train", CheckpointMetrics).get("training", {}) if metrics.is_file() else {}
        return dict(found)

    @property
    def hub_base(self) -> str | None:
        """The id of its base on the hub, if it has one."""
        recorded: str = self.manifest["base"]["source"]
        return recorded.partition("@")[0] if is_hub_id(recorded) else None

    @property
    def complete(self) -> bool:
        """Whether it is an export already."""
        return self.source is self.base and (self.source.path / CARD).is_file()


@contextmanager
def found(workspace: Workspace, name: str) -> Iterator[Made]:
    """Find a stage, a run or a folder by name, and keep training from dropping it as long as the context lasts.

    Raises:
        UsageError: nothing has that name, or rr did not make it. RRError: the stage was not made yet.
    """
    with reading(lambda: source_named(workspace, name)) as source:
        if source.manifest is None:
            raise UsageError(
                f"{name} is a model that rr did not change: there is nothing to export",
                f"Name a stage ({', '.join(STAGES[1:])}), a run or a checkpoint.",
            )
        yield Made(name, source, base_of(source, workspace.directory))


def source_named(workspace: Workspace, name: str) -> ModelSource:
    """Find a model by the name of a stage or a run, or as `--model` names one.

    Raises:
        UsageError: nothing has that name. RRError: the stage was not made yet.
    """
    if name in STAGES:
        return workspace.stage_model(name)
    runs = workspace.directory / workspace.settings.checkpoint_dir
    if "/" not in name and checkpoints(runs / name):
        return workspace.resolve(str(runs / name))
    if "/" in name or name == "default" or (workspace.directory / name).exists():
        return workspace.resolve(name)
    made = [run.name for run in sorted(runs.glob("[!.]*")) if checkpoints(run)]
    raise UsageError(
        f"'{name}' is neither a stage nor a run nor a folder", suggest(name, dict.fromkeys([*STAGES, *made]))
    )


def export_to(
    folder: Path,
    made: Made,
    settings: CommonSettings,
    directory: Path,
    *,
    title: str,
    merge: bool = False,
    comparison: str = "",
) -> int:
    """Fill an empty folder with the export; return how many weight files had to be copied.

    Args:
        title: the model's name in its card. comparison: `rr compare` as Markdown, or ''.
        merge: add the adapters of a model without recursion to its weights, in the number format these are stored in.

    Raises:
        UsageError: there are no adapters, or they belong to the passes of a recursion.
    """
    if merge:
        _refuse_merge(made)
    ends = _ends(made, trust_remote_code=settings.trust_remote_code)
    text = card(made, title, comparison, merged=merge).text()
    base = made.base.path
    content = Content(base, base, made.source.path, ends, text, made.hub_base, merge)
    if not merge and not made.base.is_gguf:
        return fill(folder, content)
    with TemporaryDirectory(prefix=".rr-export-", dir=folder.parent, ignore_cleanup_errors=True) as name:
        place = Path(name)
        _write_weights(place, made, settings, directory, merge=merge)
        return fill(folder, replace(content, base=place if made.base.is_gguf else base, weights=place))


def card(made: Made, title: str, comparison: str = "", *, merged: bool = False) -> Card:
    """Return the model card of what is exported."""
    about = made.manifest["base"]
    commit = f" at commit {about['commit']}" if "commit" in about else ""
    return Card(
        title=title,
        base=made.hub_base or Path(about["source"]).name,
        hub_base=made.hub_base,
        revision=commit,
        manifest=made.manifest,
        training=made.training,
        comparison=comparison,
        merged=merged,
    )


def _refuse_merge(made: Made) -> None:
    if not made.manifest.get("lora"):
        raise UsageError(f"{made.name} has no LoRA adapters to merge", "Leave --merge out.")
    if made.manifest["recursion"]:
        raise UsageError(
            f"the LoRA adapters of {made.name} cannot be merged: they are on in the passes of its recursion alone",
            "Leave --merge out: the export keeps them beside its weights.",
        )
    if held := made.training.get("quantize"):
        raise UsageError(
            f"the LoRA adapters of {made.name} were trained on weights in {held}, and would be added to whole ones",
            "Leave --merge out: the export keeps them beside its weights, and its page says how to load it.",
        )
    if not made.base.is_gguf and "quantization_config" in read_json(made.base.path / "config.json", "its author", dict):
        raise UsageError(f"the weights of {made.name} are quantised: adapters cannot be added", "Leave --merge out.")


def _write_weights(place: Path, made: Made, settings: CommonSettings, directory: Path, *, merge: bool) -> None:
    """Write the weights of a model, with its adapters added or as they are, in the number format of its base.

    Those of a GGUF file are written as they are computed with.
    """
    from rrcli.models.loading import load
    from rrcli.upstream import forget_quantisation

    formats = {"BF16": "bfloat16", "F16": "float16"}
    dtype = "float32" if made.base.is_gguf else formats.get(inspect_weights(made.base.path).dtype, "float32")
    source = made.source if merge else made.base
    model, _ = load(
        source.path if source.name != "default" else "default",
        dtype=dtype,
        device="cpu",
        trust_remote_code=settings.trust_remote_code,
        directory=directory,
    )
    if merge:
        model.lora.merge()
    if made.base.is_gguf:
        forget_quantisation(model)
    model.save_pretrained(place)


def _ends(made: Made, *, trust_remote_code: bool) -> list[int]:
    """Return every token that ends a text of the model, as rr's own decoding has them."""
    from transformers import GenerationConfig

    from rrcli.data.tokens import end_tokens
    from rrcli.models.config import load_config
    from rrcli.models.loading import load_tokenizer

    carries = (made.source.path / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(made.source if carries else made.base, trust_remote_code=trust_remote_code)
    config = load_config(made.base, trust_remote_code=trust_remote_code)
    own = made.base.path / "generation_config.json"
    try:
        generation = GenerationConfig.from_pretrained(str(made.base.path)) if own.is_file() else None
    except (OSError, ValueError) as error:
        raise RRError(f"cannot read {own}: {error}", "Download or copy the model again.") from error
    return sorted(end_tokens(SimpleNamespace(config=config, generation_config=generation), tokenizer))
