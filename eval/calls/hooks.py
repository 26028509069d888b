"""run: the host's time in the patch's hooks, call by call, on UNets of real structure and no weights.

The UNet is on the meta device and nothing of it runs. Its inputs are on the CPU, so that where tokens are merged the
rows hold what a GPU would compute beside its host, too: the layout of the merges. The rows in which nothing is merged
are the host's own time. Times are the thread's processor time, so that what else runs on the machine counts little.
Reads are those of a device's tensor (`.item()`, `bool()`) beside that of the run's timesteps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from datetime import date
from typing import Any

import diffusers
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import agentsd
from agentsd.patch import get_patch
from eval.common.environment import commit, device_name
from eval.common.fingerprint import package_versions
from eval.common.models import ARCHITECTURES

CASES = {"SD 1.5, 512 px": ("sd15", 64), "SDXL, 1024 px": ("sdxl", 128)}
_READS = {"aten._local_scalar_dense.default", "aten.equal.default", "aten.is_nonzero.default"}


class CountReads(TorchDispatchMode):
    """Counts reads of tensors to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.reads += str(func) in _READS
        return func(*args, **(kwargs or {}))


def hook_times(unet: Any, size: int, steps: int) -> list[tuple[str, float]]:
    """One run of hooks around calls that compute nothing: for each call its kind and the seconds in the hooks."""
    patch = get_patch(unet)
    assert patch is not None
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(steps)
    config = unet.config
    sample = torch.randn(2, config.in_channels, size, size)
    text = torch.randn(2, 77, config.cross_attention_dim)
    extra = {"text_embeds": torch.randn(2, 1280), "time_ids": torch.randn(2, 6)}
    kwargs = {"encoder_hidden_states": text, "added_cond_kwargs": extra}
    kept = torch.zeros(1)
    times = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no layer is reached, as nothing runs
        for timestep in scheduler.timesteps:
            before = time.thread_time()
            patch._enter(unet, (sample, timestep), kwargs)
            cached = patch.call is not None and patch.call.cached
            if patch.caching is not None and not cached:
                patch.caching.switch.kept = kept
            patch._leave(unet, (sample, timestep), kept)
            times.append(("cached" if cached else "whole", time.thread_time() - before))
    return times


def run(options: argparse.Namespace, command: str) -> None:
    """Time the hooks without and with step caching, and print a table."""
    lines = [
        "| | a whole call, ms: median (least) | a cached call | the slowest | reads in a run, beside the timesteps |",
        "|---|---|---|---|---|",
    ]
    for name, (architecture, size) in CASES.items():
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel(**ARCHITECTURES[architecture]["unet"]).eval()
        for settings in (
            {},
            {"cache_interval": options.interval},
            {**_NOTHING_MERGED, "cache_interval": options.interval},
        ):
            agentsd.apply_patch(unet, **settings)
            hook_times(unet, size, options.steps)
            with CountReads() as counted:
                hook_times(unet, size, options.steps)
            times: dict[str, list[float]] = {}
            for _ in range(options.rounds):
                for kind, seconds in hook_times(unet, size, options.steps):
                    times.setdefault(kind, []).append(1e3 * seconds)
            # On a busy machine, whose caches others fill, the least is nearest to what an idle one takes.
            cells = [
                f"{statistics.median(one):.2f} ({min(one):.2f})" for one in (times["whole"], times.get("cached")) if one
            ]
            cells += [""] * (2 - len(cells))
            slowest = max(max(one) for one in times.values())
            what = ", ".join(f"{field}={value}" for field, value in settings.items()) or "the defaults"
            lines.append(f"| {name}, {what} | {cells[0]} | {cells[1]} | {slowest:.1f} | {counted.reads} |")
        agentsd.remove_patch(unet)
    versions = ", ".join(f"{package} {version}" for package, version in package_versions().items())
    lines += ["", f"`{command}`: medians of {options.rounds} runs of {options.steps} DDIM steps, batch 2, "
              f"{device_name(torch.device('cpu'))} (load {os.getloadavg()[0]:.1f}), {versions}, commit {commit()}, "
              f"{date.today()}."]  # fmt: skip
    text = "\n".join(lines)
    print(text)
    if options.out:
        options.out.write_text(f"# Host time of the patch's hooks\n\n{text}\n", "utf-8")


_NOTHING_MERGED = {"ratio": 0.0, "early": 0.0}
