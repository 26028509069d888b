"""One line that names the machine and the software of a run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def machine_line(device: torch.device, dtype: torch.dtype) -> str:
    """Device, data type, threads, versions and commit."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "torchvision"))
    return (
        f"{_device(device)}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} CPU threads, "
        f"Python {platform.python_version()}, {versions}, commit {_commit()}"
    )


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{device.type.upper()} {name} ({os.cpu_count()} cores)"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
