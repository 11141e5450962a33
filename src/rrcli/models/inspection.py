"""Check the weight files of a model by their index and headers; tensor data is never read. Loads no torch."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrcli.errors import RRError
from rrcli.files import read_json, safetensors_header
from rrcli.models.weights import weight_files, weight_index
from rrcli.recursion.facts import CONTEXT_NAMES
from rrcli.schemas import WeightIndex

# Bits of one element, for every number format of the safetensors specification.
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
GGUF_VERSIONS = (2, 3)
HINT = "Download or copy the model again."
# Where a configuration of several models keeps that of the one that generates text.
NESTED = ("decoder", "generator", "text_config")


@dataclass(frozen=True)
class Weights:
    """The weights of a model, as their headers describe them.

    Attributes:
        files: the weight files. size: their bytes. tensors: the number of tensors (0 = not counted).
        dtype: the number format of most bytes, as safetensors calls it ("BF16"); empty for GGUF.
    """

    files: list[Path]
    size: int
    tensors: int
    dtype: str


def inspect_weights(source: Path) -> Weights:
    """Check the weight files of a model folder, or a `.gguf` file, and return what they hold.

    Raises:
        RRError: a file is missing, truncated or malformed, a number format is unknown, or a tensor is not where the
            index says. All problems of the folder are collected; the message names the first and counts the others.
    """
    files = weight_files(source)
    size = sum(file.stat().st_size for file in files)
    if source.is_file():
        return Weights(files, size, _gguf_tensors(source), "")
    headers = {file.name: safetensors_header(file) for file in files}
    problems = [
        f"{source / name}: {problem}" for name, header in headers.items() for problem in _header_problems(header)
    ]
    index = weight_index(source)
    if index is not None:
        problems += _index_problems(index, headers)
    if problems:
        more = f" ({len(problems) - 1:,} more problems like this)" if len(problems) > 1 else ""
        raise RRError(problems[0] + more, HINT)
    formats: Counter[str] = Counter()
    for header in headers.values():
        for entry in header.values():
            formats[entry["dtype"]] += entry["data_offsets"][1] - entry["data_offsets"][0]
    main = formats.most_common(1)[0][0] if formats else ""
    return Weights(files, size, sum(map(len, headers.values())), main)


def stated_context(source: Path) -> int | None:
    """Return the longest input that a model folder's config.json states, in tokens; None where it states none.

    Only the names are read that count first for the loaded model too (`recursion.facts.context_length`).
    """
    try:
        config = dict(json.loads((source / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # whoever loads the configuration says what is wrong with it
        return None
    nested = next((config[name] for name in NESTED if isinstance(config.get(name), dict)), config)
    found = (nested.get(name) for name in CONTEXT_NAMES[:2])
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _header_problems(header: dict[str, Any]) -> Iterable[str]:
    """Yield what is wrong with a header: formats, sizes, and offsets that leave a gap or overlap."""
    expected = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        dtype, shape = entry.get("dtype"), entry.get("shape")
        if dtype not in BITS:
            yield f"tensor '{name}' has the unknown number format {dtype!r}"
        elif not isinstance(shape, list) or not all(isinstance(side, int) and side >= 0 for side in shape):
            yield f"tensor '{name}' has the shape {shape!r}"
        elif (end - begin) * 8 != (needed := math.prod(shape) * BITS[dtype]):
            yield f"tensor '{name}' needs {needed // 8} bytes ({dtype}, shape {shape}), its header gives {end - begin}"
        elif begin != expected:
            yield f"tensor '{name}' begins at byte {begin} of the data, byte {expected} was expected"
        expected = end


def _index_problems(index: Path, headers: dict[str, dict[str, Any]]) -> Iterable[str]:
    weight_map = read_json(index, "the model's author", WeightIndex)["weight_map"]
    for tensor, shard in weight_map.items():
        if tensor not in headers[shard]:
            yield f"{index} names the tensor '{tensor}' in {shard}, which does not have it"


def _gguf_tensors(path: Path) -> int:
    """Return how many tensors a GGUF file says it holds: magic, version (u32), tensor count (u64), little-endian."""
    with path.open("rb") as file:
        start = file.read(16)
    if len(start) < 16 or start[:4] != b"GGUF":
        raise RRError(f"{path} is not a GGUF file: it does not start with 'GGUF' and a header", HINT)
    version, tensors = struct.unpack("<IQ", start[4:])
    if version not in GGUF_VERSIONS:
        raise RRError(
            f"{path} is GGUF version {version}", f"Versions {GGUF_VERSIONS[0]} and {GGUF_VERSIONS[1]} are read."
        )
    if not tensors:
        raise RRError(f"{path} has no tensors", HINT)
    return int(tensors)
