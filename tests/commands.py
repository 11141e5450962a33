"""`rr` in a test: as a process of its own, as a user starts it, or in this one, which has the libraries loaded."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import traceback
from pathlib import Path

from typer.testing import CliRunner

from rrcli.cli.commands import app

RR = Path(sys.executable).with_name("rr")


def rr_process(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command in a folder. Importing what it needs takes seconds."""
    return subprocess.run(
        [RR, *arguments], cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


def rr(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, without a process; an error that escapes shows as a process would show it."""
    with contextlib.chdir(folder):
        done = CliRunner().invoke(app, arguments, env=environment)
    escaped = done.exception if not isinstance(done.exception, SystemExit) else None
    trace = "".join(traceback.format_exception(escaped)) if escaped is not None else ""
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr + trace)
