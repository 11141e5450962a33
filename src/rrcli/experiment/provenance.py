"""Where and with what a result was computed: versions, device and hardware, seed, and the git commit of the folder."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rrcli import __version__
from rrcli.settings import CommonSettings

PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "reasoning-gym")


def provenance(settings: CommonSettings, directory: Path, device: str, dtype: str) -> dict[str, Any]:
    """Return what else a result depends on: versions, device, dtype, seed, and the git commit where there is one."""
    try:
        commit = subprocess.run(
            ["git", "-C", str(directory), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {
        "rr": __version__,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "device": device,
        "dtype": dtype,
        "machine": f"{platform.system()} {platform.machine()}",
        "hardware": _hardware(device),
        "seed": settings.seed,
        "git_commit": commit or None,
    }


def _hardware(device: str) -> str:
    """Return the name of the GPU or CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    try:
        cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not on Linux
        cpus = []
    names = (line.partition(":")[2].strip() for line in cpus if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
