"""Run the stages that the arguments of vision_bench.py name and write results.md and results.json."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from agentsd.files import write_atomically
from eval.common.protocol import BenchError

from . import counts, imagenet, speed
from .machine import machine_line
from .paper import PAIRS
from .report import as_markdown

_STAGES = ("counts", "throughput", "growth")


def run(options: argparse.Namespace, command: str) -> int:
    """Do what the arguments say; returns the exit code.

    Raises:
        BenchError: wrong input.
    """
    stages = [part for part in options.stages.split(",") if part]
    if strangers := set(stages) - set(_STAGES):
        raise BenchError(f"--stages {', '.join(sorted(strangers))}: must be of {', '.join(_STAGES)}")
    if options.imagenet and options.stages == "counts,throughput,growth":
        stages = []  # accuracy only, unless stages are named besides
    sizes = {key: _sizes(getattr(options, key), key, unit) for key, unit in (("sizes", 32), ("growth", 16))}
    for name, high in (("batch_size", 4096), ("imagenet_batch", 4096), ("rounds", 1000)):
        if not 1 <= getattr(options, name) <= high:
            raise BenchError(f"--{name.replace('_', '-')} {getattr(options, name)}: must lie in 1 … {high}")
    imagenet.check(options)
    device, dtype = _device(options.device), getattr(torch, options.dtype)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if options.clock == "cpu" and device.type != "cpu":
        raise BenchError(f"--clock cpu: does not see what {device.type} does; leave it out")
    timed = speed.Timing(options.batch_size, options.rounds, device, dtype, options.clock)
    results: dict[str, Any] = {}
    if options.imagenet:
        results["imagenet"] = imagenet.evaluate_checkpoint(options, out, dtype)
        if results["imagenet"] is None:
            return 0  # the main process writes
    if "counts" in stages:
        results["counts"] = counts.rows()
    if "throughput" in stages:
        results["throughput"] = speed.throughput(PAIRS[options.pairs], sizes["sizes"], timed)
    if "growth" in stages:
        results["growth"] = speed.growth(sizes["growth"], timed)
    machine = machine_line(device, dtype)
    text = as_markdown(
        "vision_bench: agent transformers",
        [
            f"`{command}`",
            machine,
            f"Batch size {options.batch_size}, {options.rounds} interleaved rounds after a warm-up, "
            + ("wall-clock time." if options.clock == "wall" else "CPU time of the process: other processes ran too."),
        ],
        results,
    )
    write_atomically(out / "results.json", json.dumps({"command": command, "machine": machine, **results}, indent=1))
    write_atomically(out / "results.md", text)
    print(text)
    return 0


def _sizes(text: str, name: str, unit: int) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if not all(size >= unit and size % unit == 0 and size <= 4096 for size in sizes):
        raise BenchError(f"--{name} {text!r}: must be multiples of {unit} in {unit} … 4096 with commas between")
    return sizes


def _device(name: str | None) -> torch.device:
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name or best)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BenchError(f"--device {name}: is not usable here ({error}); leave it out for {best}") from error
    return device
