"""Make the settings of a command from all sources, and read and write `rr.toml`.

A value is taken from the command line, else from the environment (`RR_<SECTION>_<NAME>`), else from `rr.toml`, else it
is the option's default.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_type_hints

from rrcli.errors import UsageError, suggest
from rrcli.settings import SECTIONS, CommonSettings, S, flag_name, own_fields

SETTINGS_FILE = "rr.toml"
KINDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
# More seeds than this are taken for a mistake: `--seeds 1234` where `--seed 1234` was meant.
MOST_SEEDS = 100
BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def load(
    cls: type[S],
    directory: Path,
    flags: Mapping[str, Any] | None = None,
    *,
    names: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    use_file: bool = True,
) -> S:
    """Build the settings of one command from every source.

    Args:
        flags: option -> value on the command line; None for options that were not given.
        names: option -> how it is written on the command line, where that is not its own name; for error messages.
        environment: the process's own if not given.
        use_file: whether to read `rr.toml`.

    Raises:
        UsageError: an unknown key in `rr.toml`, a value of the wrong type or outside its limits, or a seed that is not
            among the seeds of the experiment; names the place.
    """
    file = read_file(directory) if use_file else {}
    environment = os.environ if environment is None else environment
    values: dict[str, tuple[Any, str]] = {}
    sections: tuple[type[CommonSettings], ...] = tuple(dict.fromkeys((CommonSettings, cls)))
    for section in sections:
        for item in own_fields(section):
            key = item.name
            if key in file.get(section.SECTION, {}):
                values[key] = (file[section.SECTION][key], f"{SETTINGS_FILE} [{section.SECTION}] {key}")
            for variable in (f"RR_{section.SECTION}_{key}".upper(),) + (
                (f"RR_{key}".upper(),) if section is CommonSettings else ()
            ):
                if variable in environment:
                    values[key] = (environment[variable], variable)
    for key, value in (flags or {}).items():
        if value is not None:
            values[key] = (value, (names or {}).get(key, flag_name(key)))
    types = get_type_hints(cls)
    checked = {
        item.name: _check(item, types[item.name], *values[item.name]) for item in fields(cls) if item.name in values
    }
    if seeds := checked.get("seeds"):
        seed, listed = checked.setdefault("seed", seeds[0]), ",".join(map(str, seeds))
        if seed not in seeds:
            # The first seed has the plain names: one that was there before stays the first.
            more = f"{seed},{listed}" if values["seeds"][1].startswith("--") else f"{listed},{seed}"
            raise UsageError(
                f"{values['seed'][1]} is {seed}, which is not among the seeds of the experiment: {listed}",
                f"Take one of them, or add it: --seeds {more}.",
            )
    return cls(**checked)


def read_file(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the sections of `rr.toml`, or nothing where there is none.

    Raises:
        UsageError: the file is not valid TOML, or has an unknown section or key.
    """
    path = directory / SETTINGS_FILE
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}", "Correct it, or run 'rr setup --overwrite'.") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    known = {section.SECTION: [item.name for item in own_fields(section)] for section in SECTIONS}
    home = {key: section for section, keys in reversed(known.items()) for key in keys}
    for name, table in document.items():
        if not isinstance(table, dict):
            section = name if name in known else home.get(name)
            hint = f"Put it under [{section}]." if section else suggest(name, home)
            raise UsageError(f"'{name}' in {path} stands outside a section", hint)
        if name not in known:
            raise UsageError(f"unknown section [{name}] in {path}", suggest(name, known))
        for key in table:
            if key not in known[name]:
                hint = f"It belongs in [{home[key]}]." if key in home else suggest(key, known[name])
                raise UsageError(f"unknown key '{key}' in {path}, section [{name}]", hint)
    return document


def write_file(common: CommonSettings, changes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the text of an `rr.toml` with every option and its help.

    Args:
        common: the values of section `[common]`. changes: section -> option -> value, where it is not the default.
    """
    lines = ["# Options of every rr command. Flags and RR_<SECTION>_<NAME> variables override them."]
    for section in SECTIONS:
        lines += ["", f"[{section.SECTION}]"]
        for item in own_fields(section):
            value = getattr(common, item.name) if section is CommonSettings else item.default
            value = changes.get(section.SECTION, {}).get(item.name, value)
            lines += [f"# {item.metadata['help']}", f"{item.name} = {_toml(value)}"]
    return "\n".join(lines) + "\n"


def _check(item: Field[Any], kind: Any, value: Any, place: str) -> Any:
    if kind == tuple[int, ...]:
        return read_seeds(value, place)
    try:
        value = _convert(kind, value)
    except (TypeError, ValueError) as error:
        name = KINDS.get(kind, "a list of strings")
        raise UsageError(f"{place} is {value!r}, which is not {name}") from error
    choices, minimum = item.metadata["choices"], item.metadata["minimum"]
    if choices and value not in choices:
        raise UsageError(f"{place} is '{value}'", suggest(str(value), choices))
    if minimum is not None and value < minimum:
        raise UsageError(f"{place} is {value}", f"It must be at least {minimum:g}.")
    maximum = item.metadata["maximum"]
    if maximum is not None and value > maximum:
        raise UsageError(f"{place} is {value}", f"It must be at most {maximum:g}.")
    return value


def read_seeds(value: Any, place: str) -> tuple[int, ...]:
    """Return the seeds that an option names: a number of seeds, counted from 0, or a list of them.

    Args:
        value: a whole number, a text such as "3" or "0,5,7", or a list of numbers; no seed for an empty one.
        place: where it was written, for error messages.

    Raises:
        UsageError: it is neither, or a seed is negative or named twice.
    """
    hint = "Write how many seeds, such as 3 for 0, 1 and 2, or a list of seeds, such as 0,5,7."
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    parts = [part.strip() if isinstance(part, str) else part for part in parts]
    alone = not isinstance(value, (list, tuple)) and len(parts) == 1 and parts != [""]
    parts = [part for part in parts if part != ""]
    if not all(str(part).isascii() and str(part).isdigit() for part in parts):
        raise UsageError(f"{place} is {value!r}, which names no seeds", hint)
    seeds = tuple(map(int, parts))
    if alone:
        if not 1 <= seeds[0] <= MOST_SEEDS:
            raise UsageError(f"{place} asks for {seeds[0]} seeds", f"{hint} One seed alone is --seed {seeds[0]}.")
        return tuple(range(seeds[0]))
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"{place} is {value!r}, which names a seed twice", hint)
    return seeds


def _convert(kind: Any, value: Any) -> Any:
    if kind is bool:
        value = BOOLEANS.get(value.lower(), value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise TypeError(value)
        return value
    if kind in (int, float):
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise TypeError(value)
        number = kind(value)
        if not math.isfinite(number):
            raise ValueError(value)
        return number
    if kind is str:
        if not isinstance(value, str):
            raise TypeError(value)
        return value
    if isinstance(value, str):  # from the environment
        return tuple(part.strip() for part in value.split(";") if part.strip())
    if not all(isinstance(part, str) for part in value):
        raise TypeError(value)
    return tuple(value)


def _toml(value: Any) -> str:
    if value is MISSING:
        raise AssertionError("every option has a default")
    text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")  # JSON leaves it as it is, TOML forbids it
