"""Reads what the user gives for generations: the file of prompts to continue, and the texts that end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rrcli.data.lines import file_lines, json_objects, placed
from rrcli.errors import RRError, UsageError


def stop_strings(typed: Sequence[str]) -> list[str]:
    """Return stop strings with `\\n` and `\\t`, as they are typed in a shell, replaced by a line feed and a tab.

    Raises:
        UsageError: a stop string is empty.
    """
    stop = [text.replace("\\n", "\n").replace("\\t", "\t") for text in typed]
    if not all(stop):
        raise UsageError("--stop is empty: every answer would end before it began", "Leave it out, or name a text.")
    return stop


def prompts_file(spec: str, directory: Path) -> Path:
    """Return the file of prompts that `spec` names.

    Raises:
        UsageError: it does not exist, or is of an unknown kind.
    """
    path = (directory / spec).expanduser()
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(f"the prompts {path} are of an unknown kind", "Known: .txt, .jsonl.")
    if not path.is_file():
        raise UsageError(f"the prompts {path} do not exist", "Name a .txt or .jsonl file.")
    return path


def read_prompts(spec: str, directory: Path) -> tuple[str, ...]:
    """Return the prompts of a file, without repeats: a .txt file's lines, a .jsonl file's `prompt` on each line.

    Raises:
        UsageError: see `prompts_file`. RRError: the file is empty or not UTF-8, or a line has no prompt.
    """
    path = prompts_file(spec, directory)
    if path.suffix == ".txt":
        prompts = [text for _, text in placed(file_lines(path), str(path))]
    else:
        prompts = []
        for place, value in json_objects(file_lines(path), str(path)):
            prompt = value.get("prompt")
            if not isinstance(prompt, str) or not prompt.strip():
                raise RRError(f"{place}: no 'prompt'", 'Write {"prompt": "..."} on each line.')
            prompts.append(prompt)
    if not prompts:
        raise RRError(f"{path} is empty", "It needs at least one prompt.")
    return tuple(dict.fromkeys(prompts))
