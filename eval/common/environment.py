"""The machine and the software of a run, as data and as a line of text."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .fingerprint import package_versions


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The machine and the software that this process runs on."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "attention_backend": "SDPA",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": package_versions(),
        "commit": commit(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
    return found


def environment_line(environment: dict[str, Any]) -> str:
    """The environment as one line of text."""
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    return (
        f"{environment['device']}, {environment['dtype']}, {environment['attention_backend']}, "
        f"{environment['threads']} CPU threads, Python {environment['python']}, {versions}, "
        f"commit {environment['commit']}"
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{device.type.upper()} {name or platform.machine()} ({os.cpu_count()} cores)"


def commit() -> str:
    """The commit of this checkout, "-dirty" where files differ from it; "unknown" outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
