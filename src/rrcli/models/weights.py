"""Find the files of a model folder that decide what the model does, and tell models apart by them. Loads no torch.

Weights are taken from the files that `from_pretrained` of transformers takes them from, in its order:

    1. the file, or the index of shards, that config.json names under `transformers_weights`
    2. model.safetensors
    3. the shards that model.safetensors.index.json names

Others are not read: variants (model.fp16.safetensors), adapters, the states of optimisers, the original weights under
other names, an index or shards that were left behind when the folder was saved again as one file, and pickled weights.
"""

from __future__ import annotations

import hashlib
import json
import platform
import struct
from pathlib import Path
from typing import Any

from rrcli.errors import RRError
from rrcli.files import MANIFEST, METRICS_FILE, SIDECAR, read_json, safe_name, safetensors_header
from rrcli.schemas import Stamps, WeightIndex

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Where an export keeps adapters that belong to the passes of a recursion: beside a model's weights, transformers would
# add them to every pass.
ADAPTER_FOLDER = "adapter"
NAMED = "transformers_weights"
AGAIN = "Download or copy the folder again."

# Weight files up to this size are hashed whole. Of a larger one a fingerprint reads the header and this many blocks,
# spread over the rest: enough to notice any training step, and no more for a model of 100 GB than for one of 1 GB.
WHOLE_BYTES = 64 * 2**20
SAMPLED_BLOCKS = 16
BLOCK_BYTES = 64 * 1024

# Other files that decide what a model does: configurations, tokenizers, chat templates, and the model's own code.
SUFFIXES = (
    *(".json", ".jinja", ".py", ".txt", ".model"),
    *(".spm", ".codes", ".bpe", ".tiktoken", ".vocab", ".tokenizer"),
)
HASHED_BY_0_1 = (
    *("config.json", "generation_config.json", "adapter_config.json", MANIFEST),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "chat_template.jinja"),
)
TEMPLATES = "additional_chat_templates"
# What lies beside a model with one of these suffixes, and is read by people or trainers alone.
NOT_READ = ("readme", "license", "notice", "requirements", "trainer_state.", "training_args.", METRICS_FILE)
NOT_READ_ENDINGS = (".index.json", "_results.json")


def weight_index(folder: Path) -> Path | None:
    """Return the index of shards that transformers reads in a model folder; None where it reads a single file."""
    named = _named_weights(folder)
    if named:
        return folder / named if named.endswith(".index.json") else None
    return None if (folder / MODEL).is_file() or not (folder / INDEX).is_file() else folder / INDEX


def weight_paths(source: Path) -> list[Path]:
    """Return the files that hold the weights of a model folder or `.gguf` file, unchecked; none where there are none.

    Raises:
        RRError: the index is not readable, or a name in it leaves the folder.
    """
    if source.is_file():
        return [source]
    index = weight_index(source)
    if index is not None:
        weight_map = read_json(index, "the model's author", WeightIndex)["weight_map"]
        return [source / safe_name(name, "shard") for name in sorted(set(weight_map.values()))]
    named = _named_weights(source)
    return [source / (named or MODEL)] if named or (source / MODEL).is_file() else []


def weight_files(source: Path) -> list[Path]:
    """Return the files that hold the weights of a model folder or `.gguf` file, checked for truncation.

    Raises:
        RRError: no weights, only pickled weights, a shard that the index names is missing, or a truncated file.
    """
    files = weight_paths(source)
    if source.is_file():
        return files
    if not files:
        raise RRError(f"{source} holds {_instead(source)}", f"A model folder needs config.json and {MODEL}, or shards.")
    for file in files:
        if not file.exists():
            raise RRError(f"{source} lacks {file.name}, which its index or config.json names", AGAIN)
        safetensors_header(file)
    return files


def behaviour_files(source: Path) -> list[Path]:
    """Return all other files that decide what a model does, as far as they lie beside its weights."""
    if source.is_file():  # transformers reads these beside a GGUF file
        names = ("generation_config.json", "tokenizer_config.json")
        return [source.with_name(name) for name in names if source.with_name(name).is_file()]
    index = weight_index(source)
    found = [path for path in source.iterdir() if path == index or _is_read(path.name)]
    found += [source / ADAPTER_FOLDER / ADAPTER_CONFIG] if (source / MANIFEST).is_file() else []
    return sorted(path for path in [*found, *(source / TEMPLATES).glob("*.jinja")] if path.is_file())


def adapter_folder(source: Path) -> Path:
    """Return where a folder of rr keeps its adapters: itself, or a folder in an export of a recursive model."""
    inner = source / ADAPTER_FOLDER
    return inner if (inner / ADAPTER_CONFIG).is_file() else source


def refuse_adapter(source: Path) -> None:
    """Refuse a model folder with an adapter of peft in it, which transformers would add to the weights when it loads.

    Raises:
        RRError: it has one.
    """
    folder = source.parent if source.is_file() else source
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    if source.is_dir() and not weight_paths(folder):
        raise RRError(
            f"{folder} is an adapter on another model: it holds {ADAPTER_CONFIG} and no weights",
            "Merge it with peft's merge_and_unload(), and save the result with save_pretrained() into a new folder.",
        )
    raise RRError(
        f"{folder} holds {ADAPTER_CONFIG} beside the model's weights: transformers adds that adapter to them",
        f"If it is merged into the weights already, move {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} out of the folder. If "
        "not, merge it with peft's merge_and_unload(), and save the result with save_pretrained() into a new folder.",
    )


# -- telling models apart ----------------------------------------------------------------------------------------------


def fingerprint(source: Path) -> str:
    """Return a short hash of what decides what a model folder or `.gguf` file does, wherever it lies.

    Everything is hashed whole but weight files above `WHOLE_BYTES`: of those the size, the header and
    `SAMPLED_BLOCKS` blocks. What a change between these blocks leaves behind are its times; see `stamps`.
    """
    digest = hashlib.sha256()
    for path in _own_weights(source):
        digest.update(f"{path.name if source.is_dir() else ''}:".encode())
        _hash_weights(path, digest)
    for path in behaviour_files(source):
        name = path.relative_to(source).as_posix() if source.is_dir() else path.name
        with path.open("rb") as file:
            digest.update(f"{name}:".encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def fingerprint_0_1(source: Path) -> str:
    """Return the fingerprint that manifests of version 0.1 hold, so that their folders can be read."""
    digest = hashlib.sha256()
    files = (
        sorted(p for p in source.iterdir() if p.suffix in (".safetensors", ".gguf")) if source.is_dir() else [source]
    )
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name if source.is_dir() else ''}:{size}\n".encode())
        with path.open("rb") as file:
            head = file.read(8)
            if path.suffix == ".safetensors" and len(head) == 8:
                digest.update(file.read(min(struct.unpack("<Q", head)[0], size)))
            for block in range(SAMPLED_BLOCKS):
                file.seek(max(0, size - BLOCK_BYTES) * block // (SAMPLED_BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    for path in (source / name for name in HASHED_BY_0_1):
        if path.exists():
            digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def stamps(*sources: Path) -> Stamps | None:
    """Return when the weight files that a fingerprint only samples were last written; None where there are none.

    Times say something on the same machine and under the same path only: a copy has others. A file of the hub's cache
    needs none, since its name is the hash of its content.

    Returns:
        `host`, and `files`: path -> [bytes, time in nanoseconds].
    """
    files: dict[str, list[int]] = {}
    for path in (file.resolve() for source in sources for file in _own_weights(source) if file.exists()):
        found = path.stat()
        if found.st_size > WHOLE_BYTES and path.parent.name != "blobs":
            files[str(path)] = [found.st_size, found.st_mtime_ns]
    return {"host": platform.node(), "files": files} if files else None


def written_since(recorded: Stamps | None, *sources: Path) -> str:
    """Return the first large weight file that was written again since its stamp was recorded, or '' if none was."""
    now = stamps(*sources)
    if not recorded or not now or recorded["host"] != now["host"]:
        return ""
    before = recorded["files"]
    return next((path for path, stamp in now["files"].items() if before.get(path, stamp) != stamp), "")


def _own_weights(source: Path) -> list[Path]:
    """Return the files that hold weights of a source itself; in a folder of rr also its sidecar and adapters."""
    names = (SIDECAR, ADAPTER_WEIGHTS, f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}")
    extra = [source / name for name in names if (source / MANIFEST).is_file()]
    return [*weight_paths(source), *(path for path in extra if path.is_file())]


def _hash_weights(path: Path, digest: Any) -> None:
    if not path.exists():
        digest.update(b"missing")
        return
    size = path.stat().st_size
    digest.update(f"{size}\n".encode())
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(hashlib.file_digest(file, "sha256").digest())
            return
        head = file.read(8)
        if path.suffix == ".safetensors":
            digest.update(file.read(min(struct.unpack("<Q", head)[0], size)))
        for block in range(SAMPLED_BLOCKS):
            file.seek((size - BLOCK_BYTES) * block // (SAMPLED_BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))


def _named_weights(folder: Path) -> str:
    """Return the file that config.json names for the weights, or ''.

    Raises:
        RRError: it is no safetensors file (transformers would read a pickled adapter), or lies elsewhere.
    """
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(NAMED)
    except (OSError, ValueError, AttributeError):  # whoever loads the configuration says what is wrong with it
        return ""
    if named is None:
        return ""
    if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise RRError(
            f"{folder / 'config.json'} names {named!r} under '{NAMED}', which is no safetensors file",
            "Only safetensors are read: save the model with save_pretrained().",
        )
    return safe_name(named, NAMED)


def _is_read(name: str) -> bool:
    if name.startswith(".") or name.lower().startswith(NOT_READ) or name.endswith(NOT_READ_ENDINGS):
        return False
    return name.endswith(SUFFIXES) or name.startswith("tokenizer.")  # such as tokenizer.model.v3


def _instead(folder: Path) -> str:
    """Say what a folder without weights holds instead."""
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.name != SIDECAR)
    if others:
        return f"no {MODEL} and no {INDEX}, which transformers reads, only {', '.join(others)}"
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    return f"only pickled weights ({pickled[0].name}), which are never read" if pickled else "no weights"
