"""PeakMemory: the greatest memory in use while something runs."""

from __future__ import annotations

from pathlib import Path

import torch


class PeakMemory:
    """Peak memory from the moment it is made: the allocator's on CUDA, the process's resident set on Linux.

    Only one can measure a process (or a CUDA device) at a time: making another resets the peak of the first.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before: int | None = torch.cuda.memory_allocated(device)
        else:
            self.before = _resident("VmRSS") if _reset_resident_peak() else None

    def peak(self) -> tuple[int | None, int]:
        """(peak, growth over the beginning), in bytes; (None, 0) where they are unknown."""
        peak: int | None = None
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        elif self.device.type == "cpu":
            peak = _resident("VmHWM") if self.before is not None else None
        if peak is None or self.before is None:
            return None, 0
        return peak, max(0, peak - self.before)


def _reset_resident_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _resident("VmHWM") is not None


def _resident(key: str) -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None
