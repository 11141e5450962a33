"""`rr serve`: transformers' own server on this machine alone, with the export of a run.

There is nothing of rr's own in it but that it answers for this one model: the server calls `generate`, which decodes
with the recursion. Continuous batching does not call `generate` and would leave the recursion out, so it stays off.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rrcli.errors import RRError, UsageError
from rrcli.experiment.exporting import Made, export_to, found
from rrcli.experiment.local_servers import answer, ended, free_port, serving, watched
from rrcli.experiment.workspace import Workspace
from rrcli.reporting import Reporter
from rrcli.settings import ServeSettings

HOST = "127.0.0.1"
NAME = "transformers serve"
NEEDED = ("fastapi", "openai", "uvicorn")
PROGRAM = watched("from rrcli.upstream import serve_one_model\nserve_one_model()")
# A large model is read first.
START_SECONDS = 3600


@dataclass(frozen=True)
class Served:
    """Where the server listens.

    Attributes:
        url: its address. model: the name that requests give. listed: whether `/v1/models` names it.
        curl: a command that asks it. device, dtype: where and how it computes.
    """

    url: str
    model: str
    listed: bool
    curl: str
    device: str
    dtype: str


def serve(
    settings: ServeSettings, name: str, directory: Path, reporter: Reporter, *, started: Callable[[Served], None]
) -> None:
    """Serve a stage, a run, a checkpoint or an export until it is interrupted; `started` is called when it answers.

    Raises:
        UsageError: the extra is not installed, or nothing has that name.
        RRError: no free port, a model that the server cannot load, or the server ends with an error.
    """
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise UsageError(f"rr serve needs {', '.join(missing)}", "pip install 'rrcli[serve]'")
    port = free_port(HOST, settings.port)
    if settings.port not in (0, port):
        reporter.warn(f"port {settings.port} is taken, using {port}")
    with ExitStack() as held:
        made = held.enter_context(found(Workspace(directory, settings), name))
        folder = _folder(made, settings, directory, held)
        _refuse_own_class(folder)
        device, dtype = _device_and_dtype(settings)
        address = f"http://{HOST}:{port}"
        command = [sys.executable, "-c", PROGRAM, "serve", folder.name, "--host", HOST, "--port", str(port)]
        command += ["--device", device, "--dtype", dtype]
        if made.manifest["recursion"] or settings.trust_remote_code:
            command.append("--trust-remote-code")
        if bits := made.training.get("quantize"):
            command += ["--quantization", f"bnb-{bits}"]
        # In the folder above, the model's name in requests is that of its folder. All it needs lies there.
        process = held.enter_context(
            serving(
                command, address, name=NAME, ready="health", seconds=START_SECONDS, folder=folder.parent,
                environment={"HF_HUB_OFFLINE": "1"},
            )
        )  # fmt: skip
        try:
            started(Served(address, folder.name, _listed(address, folder.name), _curl(address, folder), device, dtype))
            code = process.wait()
        except KeyboardInterrupt:  # the usual way to end it
            return
        raise ended(process, code, NAME)


def _folder(made: Made, settings: ServeSettings, directory: Path, held: ExitStack) -> Path:
    """Return the folder to serve: an export as it is, of anything else one that is removed at the end."""
    if made.complete:
        return made.source.path
    place = held.enter_context(TemporaryDirectory(prefix=".rr-serve-", dir=directory, ignore_cleanup_errors=True))
    title = made.name if "/" not in made.name else made.source.path.name
    folder = Path(place) / title
    folder.mkdir()
    export_to(folder, made, settings, directory, title=title)
    return folder


def _refuse_own_class(folder: Path) -> None:
    """Refuse a model that brings its own class: transformers' server looks for classes of transformers alone.

    Raises:
        RRError: it is such a model.
    """
    import transformers

    [architecture, *_] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    if not hasattr(transformers, architecture):
        raise RRError(
            f"transformers' server loads classes of its own alone, and {architecture} is none of them",
            "Load the export from Python: AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True).",
        )


def _device_and_dtype(settings: ServeSettings) -> tuple[str, str]:
    from rrcli.models.loading import pick_device, pick_dtype

    device = pick_device(settings.device)
    return device, str(pick_dtype(settings.dtype, device)).removeprefix("torch.")


def _listed(address: str, model: str) -> bool:
    """Tell whether the server lists its model; transformers 5.23 lists those of the hub's cache alone."""
    try:
        return any(one["id"] == model for one in answer(address, "v1/models", NAME)["data"])
    except RRError:
        return False


def _curl(address: str, folder: Path) -> str:
    """Return a command that asks for a streamed answer: to a chat, if the model has a template for one."""
    chats = (folder / "chat_template.jinja").is_file() or (folder / "additional_chat_templates").is_dir()
    body: dict[str, Any] = {"model": folder.name, "stream": True, "max_tokens": 40}
    text = "Once upon a time"
    body |= {"messages": [{"role": "user", "content": text}]} if chats else {"prompt": text}
    where = f"{address}/v1/{'chat/completions' if chats else 'completions'}"
    return f"curl {where} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
