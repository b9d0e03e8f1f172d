"""The environment of a program: versions, devices, and the commit of this project."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

import ncp

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "safetensors")


def environment() -> dict[str, Any]:
    """Versions of Python and the libraries, the GPUs of this process's machine, the project's version and commit.

    None for a library that is not installed, for CUDA without a GPU, and for the commit outside a git checkout.
    """
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "ncp": ncp.__version__,
        "commit": _commit(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        **{name: _version(name) for name in LIBRARIES},
        "cuda": torch.version.cuda if gpus else None,
        "gpus": gpus,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that is checked out, with "+changes" if files differ from it."""
    command = ["git", "-C", str(Path(ncp.__file__).parents[1]), "describe", "--always", "--abbrev=40", "--exclude=*"]
    try:
        said = subprocess.run([*command, "--dirty=+changes"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None


if __name__ == "__main__":
    print(yaml.safe_dump(environment(), sort_keys=False), end="")
