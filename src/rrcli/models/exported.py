"""What the code in an export calls, so that transformers loads and decodes it with its recursion.

The few fixed lines in an export import from here, and nothing else of rr knows of them:

    modeling_rr.py               `RecursiveForCausalLM`: what `AutoModelForCausalLM` loads with `trust_remote_code=True`
    custom_generate/generate.py  `generation`: every `model.generate`, also of programs that load the class named in
                                 config.json themselves, as `transformers serve` does; the recursion is attached then

These names are part of the format of an export: folders that were made once go on importing them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.generation import (
    EosTokenCriteria,
    GenerationMode,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from rrcli.files import MANIFEST, SIDECAR
from rrcli.models.loading import equip
from rrcli.models.manifest import AUTO_MODEL, base_auto_map, read_manifest
from rrcli.models.weights import ADAPTER_FOLDER
from rrcli.recursion.chunked_decoding import ChunkedDecoding
from rrcli.upstream import patched, remote_class, without_inference_kernels

log = logging.getLogger(__name__)

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
# Marks a model whose recursion was attached once: one that the user detached stays off.
EQUIPPED = "rr_equipped"
# Criteria that look at nothing but the tokens they are given, so that a draft can be tried on them.
PLAIN_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)
# What `generate` can be asked to return for each token, and a draft has nothing of.
PER_TOKEN = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


class RecursiveForCausalLM:
    """What `auto_map` of an export names: loads the base model as transformers does, and attaches the recursion to it.

    The result is an object of the base's own class; there is no model of this class.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: transformers asks every class from a folder's code to note how it was loaded."""

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *args: Any, config: Any, depth: int | None = None, **options: Any
    ) -> Any:
        """Load an export.

        Args:
            folder: the folder, or its id on the hub.
            config: its configuration. depth: passes after pass 0; as trained if not given.

        Raises:
            RRError: a file is missing or broken. UsageError: a depth that no recursion has.
        """
        hub = {name: options[name] for name in HUB_OPTIONS if name in options}
        place = _place(str(folder), subfolder=options.get("subfolder") or "", **hub)
        manifest = read_manifest(place) if (place / MANIFEST).is_file() else None
        config = deepcopy(config)
        config.auto_map = base_auto_map(getattr(config, "auto_map", None) or {}, manifest)
        own = config.auto_map.get(AUTO_MODEL)
        if own is None:
            found = AutoModelForCausalLM.from_pretrained(folder, *args, config=config, **options)
        else:
            found = remote_class(own, folder, **hub).from_pretrained(folder, *args, config=config, **options)
        if manifest is not None:
            _equip(found[0] if isinstance(found, tuple) else found, place, manifest, depth)
        return found


def generation(code: str) -> Callable[..., Any]:
    """Return the `generate` of an export: in chunks, with the exit that was chosen for it.

    Args:
        code: the file that asks, in transformers' cache of code; for a folder of the hub its path holds the commit.
    """
    commit = Path(code).parents[1].name

    def generate(*args: Any, model: Any, **options: Any) -> Any:
        """Generate as the `generate` of the model's class does; in chunks where that gives the same tokens."""
        if EQUIPPED not in vars(model):
            place = _place(model.config.name_or_path, revision=commit)
            _equip(model, place, read_manifest(place), None)
        stock = type(model).generate
        recursion = getattr(model, "recursion", None)
        if recursion is None or recursion.depth == 0 or options.get("custom_generate") is not None:
            return stock(model, *args, **options)
        options |= zip(list(signature(stock).parameters)[1:], args, strict=False)
        if obstacle := _obstacle(model, options):
            if obstacle not in vars(model).setdefault("rr_obstacles", set()):
                vars(model)["rr_obstacles"].add(obstacle)
                log.warning("every pass is run for every token: %s", obstacle)
            return stock(model, **options)
        decoding = ChunkedDecoding(streamer=options.pop("streamer", None))
        with _stop_strings_as_criteria(model, options):
            return stock(model, **options | {"custom_generate": decoding})

    return generate


def _equip(model: Any, place: Path, manifest: dict[str, Any], depth: int | None) -> None:
    """Attach what a folder holds to a model that was loaded from it; adapters that transformers has added stay."""
    if manifest["recursion"] is not None:
        equip(model, place, manifest)
    vars(model)[EQUIPPED] = True
    without_inference_kernels(model)
    if manifest["recursion"] is None:
        return
    if depth is not None:
        if notice := model.recursion.allow(depth):
            log.warning("%s", notice)
        model.recursion.depth = depth
        # An exit was chosen for the depth that was trained.
        model.recursion.exit = model.recursion.exit if depth == model.recursion.config.max_steps else None


def _place(name: str, *, subfolder: str = "", **hub: Any) -> Path:
    """Return the folder with the sidecar of an export, downloaded if `name` is an id of the hub."""
    if Path(name).is_dir():
        return Path(name) / subfolder
    from huggingface_hub import snapshot_download

    wanted = [MANIFEST, SIDECAR, f"{ADAPTER_FOLDER}/*"]
    patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in wanted]
    hub.pop("proxies", None)
    return Path(snapshot_download(name, allow_patterns=patterns, **hub)) / subfolder


def _obstacle(model: Any, options: dict[str, Any]) -> str:
    """Say why a call of `generate` with these options cannot be decoded in chunks; '' if it can."""
    config = deepcopy(options.get("generation_config") or model.generation_config)
    config.update(**options)
    mode = config.get_generation_mode(options.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"{mode.value.replace('_', ' ')} cannot decode chunks"
    asked = [name for name in PER_TOKEN if getattr(config, name, None)]
    if asked:
        return f"{asked[0]} is asked for"
    criteria = options.get("stopping_criteria") or []
    unknown = [
        type(one).__name__
        for one in criteria
        if not isinstance(one, PLAIN_CRITERIA) and not getattr(one, "looks_at_tokens_alone", False)
    ]
    return f"a draft cannot be tried on stopping criteria of class {unknown[0]}" if unknown else ""


@contextmanager
def _stop_strings_as_criteria(model: Any, options: dict[str, Any]) -> Iterator[None]:
    """Turn stop strings among the options of `generate`, or in a configuration, into a criterion.

    `generate` does so for its own decoding methods alone.

    Raises:
        ValueError: there is no tokenizer among the options.
    """
    tokenizer, given = options.pop("tokenizer", None), options.get("generation_config")
    places = [given, model.generation_config]
    found = options.pop("stop_strings", None) or next(
        (one.stop_strings for one in places if one and one.stop_strings), None
    )
    if not found:
        yield
        return
    if tokenizer is None:
        raise ValueError(f"the stop strings {found!r} need a tokenizer: pass tokenizer= to generate")
    own = deepcopy(model.generation_config)
    own.stop_strings = None
    if given:
        options["generation_config"] = deepcopy(given)
        options["generation_config"].stop_strings = None
    criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=found)
    options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or []), criterion])
    with patched(model, generation_config=own):
        yield
