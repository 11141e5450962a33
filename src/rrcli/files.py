"""Writes files and folders so that a reader finds them complete or not at all.

Also here: hashes, the headers of safetensors files, and checkpoints. Nothing imports torch, so every command can
look at a workspace in milliseconds.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
from safetensors import SafetensorError

from rrcli.errors import RRError, UsageError

MANIFEST = "recursion.json"
METRICS_FILE = "metrics.json"
SIDECAR = "recursion.safetensors"
TRAINER_STATE = "trainer_state"
SCHEMA = 1

Object = TypeVar("Object")

HASHED_BYTES = 2**24


# -- publishing --------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Publish `value` at `path` as JSON; see `write_text`.

    Raises:
        RRError: the folder cannot be written.
        ValueError: `value` holds a NaN (callers turn it into null with `finite`).
    """
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Publish `text` at `path` as UTF-8; see `write_bytes`.

    Raises:
        RRError: the folder cannot be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Publish `data` at `path` by a temporary file, fsync and a rename. A reader sees the old file or the new one.

    The temporary name carries the number of this process, so that what a killed one left is removed by the next.

    Raises:
        RRError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    make_folder(path.parent)
    try:
        _sweep_files(path)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def back_up(path: Path) -> None:
    """Keep what is at `path`, if anything, as `<name>.bak`.

    Raises:
        RRError: the folder cannot be written.
    """
    copy = path.with_name(path.name + ".bak")
    try:
        if path.exists():
            shutil.copyfile(path, copy)
    except OSError as error:
        raise unwritable(copy, error) from error


def read_json(path: Path, made_by: str, kind: type[Object]) -> Object:
    """Read a JSON object and check it against its type in `schemas`; unknown keys are kept.

    Raises:
        RRError: missing, cut off, of a newer schema, or a field that its type does not allow (the message names the
            field); `made_by` is the command that makes the file.
    """
    hint = f"Make it again with '{made_by}'."
    try:
        value = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        raise RRError(f"{path} does not exist", f"'{made_by}' makes it.") from None
    except OSError as error:
        raise RRError(f"cannot read {path}: {error.strerror}") from error
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise RRError(f"{path} is cut off or not JSON: {error}", hint) from error
    if not isinstance(value, dict):
        raise RRError(f"{path} holds no JSON object", hint)
    if isinstance(value.get("schema"), int) and value["schema"] > SCHEMA:
        raise RRError(f"{path} has schema {value['schema']}, this rr reads up to {SCHEMA}", "Update rr.")
    if problem := mismatch(value, kind):
        raise RRError(f"{path}: {problem}", hint)
    return cast(Object, value)


def mismatch(value: object, kind: Any) -> str:
    """Return where and how a value read from JSON does not fit a type, or nothing.

    The value itself is left as it is: `msgspec.convert` would drop keys that the type does not name.
    """
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        text, _, place = str(error).partition(" - at `$")
        place = place.rstrip("`").removeprefix(".")
        text = text[0].lower() + text[1:]
        return f"{place}: {text}" if place else text
    return ""


@contextmanager
def publish_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder to fill. On success it is synced and renamed to `path`; on failure it is removed.

    Raises:
        RRError: `path` exists and `overwrite` is off, or the parent cannot be written.
    """
    if path.exists() and not overwrite:
        raise RRError(f"{path} exists already", "Use --overwrite to replace it.")
    if path.exists() and not path.is_dir():
        raise RRError(f"{path} is a file, a folder was expected", "Move it away.")
    make_folder(path.parent)
    temporary, old = (path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{end}") for end in (".tmp", ".old"))
    try:
        temporary.mkdir()
        yield temporary
        readable = 0o666 & ~_umask()
        for file in sorted(temporary.rglob("*")):
            # safetensors makes its files private. A file with several hard links also belongs to somebody else.
            if file.is_file() and file.stat().st_nlink == 1:
                file.chmod(readable)
            _sync(file)
        _sync(temporary)
        try:
            if path.exists():
                path.rename(old)
            temporary.rename(path)
        finally:  # also if the user stops it between the two
            if old.exists() and not path.exists():
                old.rename(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error
    finally:
        _remove(temporary)
        if path.exists():
            _remove(old)


def remove_folder(path: Path) -> None:
    """Remove a folder; it is renamed first, so that what a killed process leaves of it never counts as complete."""
    doomed = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    path.rename(doomed)
    _remove(doomed)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:  # the user stops the command: the folder still goes
        shutil.rmtree(folder, ignore_errors=True)
        raise


def link(source: Path, target: Path) -> bool:
    """Give a file a second name without copying it, or copy it where that is impossible; return whether it was linked.

    Symbolic links are resolved first: a link to the relative link in a download cache would point nowhere.
    """
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:  # another device, or a file system without hard links
        shutil.copyfile(source, target)
        return False
    return True


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what a killed process left half-written in `folder`, and restore what it had just moved aside.

    Args:
        name: the name of what was written, if other commands may be writing something else into the folder now.
    """
    name = name if name == "*" else glob.escape(name)
    for leftover in [path for end in ("tmp", "old") for path in folder.glob(f".{name}.????????.{end}")]:
        original = folder / leftover.name[1:].rsplit(".", 2)[0]
        if leftover.suffix == ".old" and not original.exists():
            leftover.rename(original)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _sweep_files(path: Path) -> None:
    """Remove what processes that are gone left of writing the file `path`."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        import psutil

        process = leftover.name.split(".")[-3]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            leftover.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        RRError: a file stands in the way, or the folder is not writable.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        blocking = next((p for p in (path, *path.parents) if os.path.lexists(p) and not p.is_dir()), path)
        raise RRError(f"{blocking} is a file, a folder was expected", "Move it away, or name another folder.") from None
    except OSError as error:
        raise RRError(f"cannot create {path}: {error.strerror}", "Name a folder that you may write to.") from error
    if not os.access(path, os.W_OK):
        raise RRError(f"{path} is not writable", "Name a folder that you may write to.")


def safe_name(name: str, what: str) -> str:
    """Return `name` if it is one plain path component, so that it cannot leave its folder.

    Raises:
        UsageError: the name is empty or hidden, or has a separator in it.
    """
    if not name or name.startswith(".") or any(c in name for c in "/\\\0") or name != name.strip():
        raise UsageError(f"{what} '{name}' is not a plain name", "Use letters, digits, '-', '_' and '.'.")
    return name


def unwritable(path: Path, error: Exception) -> RRError:
    """Return an error that says what could not be written, why, and how much space is free."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    there = next(parent for parent in path.parents if parent.exists())
    return RRError(
        f"cannot write {path}: {why} ({shutil.disk_usage(there).free:,} bytes free)",
        "Nothing was changed. Free some space if the disk is full, then run the same command again.",
    )


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems refuse to sync folders
        pass
    finally:
        os.close(descriptor)


# -- looking at models -------------------------------------------------------------------------------------------------


def safetensors_header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file after checking that the file is as long as it says.

    Format: 8 bytes little-endian header length, JSON header with `data_offsets`, then the data (safetensors' own spec).

    Raises:
        RRError: the file is truncated or not safetensors; names it, and the bytes that it should have.
    """
    hint = "Download or copy the file again."
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > size - 8:
                raise RRError(f"{path} is truncated: its header needs {length + 8} bytes, it has {size}", hint)
            header = json.loads(file.read(length))
        end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    except OSError as error:
        raise RRError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RRError(f"{path} is not a safetensors file: {error}", hint) from error
    if size != 8 + length + end:
        wrong = "truncated" if size < 8 + length + end else "too long"
        raise RRError(f"{path} is {wrong}: its header describes {8 + length + end} bytes, it has {size}", hint)
    return {key: entry for key, entry in header.items() if key != "__metadata__"}


def sha256(path: Path, advance: Callable[[int], None]) -> str:
    """Return the SHA-256 of a whole file; `advance` is called with the number of bytes after each block that was read.

    Raises:
        RRError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(HASHED_BYTES):
                digest.update(block)
                advance(len(block))
    except OSError as error:
        raise RRError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def combine(*parts: Any) -> str:
    """Return a short hash of any JSON-like values, to identify "these inputs with these settings"."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def finite(value: Any) -> Any:
    """Return `value` with every NaN and infinity replaced by None, recursively, as JSON needs it."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first. A folder without its manifest does not count."""
    found = [p for p in run.glob("step-*") if (p / MANIFEST).is_file() and p.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def step_of(checkpoint: Path) -> int:
    """Return the optimiser step after which a checkpoint was saved."""
    return int(checkpoint.name[5:])
