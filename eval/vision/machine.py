"""One line that names the machine and the software of a run."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from eval.common.environment import commit, device_name


def machine_line(device: torch.device, dtype: torch.dtype) -> str:
    """Device, data type, threads, versions and commit."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "torchvision"))
    return (
        f"{device_name(device)}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} CPU threads, "
        f"Python {platform.python_version()}, {versions}, commit {commit()}"
    )
