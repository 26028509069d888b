"""Stages throughput and growth: models timed in turn, so that a busy machine slows both of a pair alike."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from agentsd.images.rounds import FEWEST, STABLE

from .counts import count
from .models import build
from .paper import PAIRS, Pair


@dataclass(frozen=True)
class Timing:
    """How models are timed.

    Attributes:
        batch: images in a call.
        rounds: calls of each model, in turn.
        clock: "wall", or "cpu" for the process's own CPU time.
    """

    batch: int
    rounds: int
    device: torch.device
    dtype: torch.dtype
    clock: str = "wall"


def throughput(pairs: Sequence[Pair], sizes: Sequence[int], timing: Timing) -> list[dict[str, Any]]:
    """One row per pair and size."""
    found = []
    for size in sizes:
        for pair in pairs:
            print(f"{pair.agent} against {pair.baseline} at {size} …", file=sys.stderr)
            row = _timed_pair(pair.baseline, pair.agent, size, timing)
            found.append({**row, "why": pair.why})
    return found


def growth(sizes: Sequence[int], timing: Timing) -> list[dict[str, Any]]:
    """Agent-DeiT-T against DeiT-T by image size, with the multiply-adds of both."""
    pair = PAIRS["small"][0]
    found = []
    for size in sizes:
        print(f"{pair.agent} against {pair.baseline} at {size} …", file=sys.stderr)
        row = _timed_pair(pair.baseline, pair.agent, size, timing)
        gmacs = {f"{kind}_gmacs": count(getattr(pair, kind), size)[1] for kind in ("baseline", "agent")}
        found.append({**row, **gmacs, "tokens": (size // 16) ** 2})
    return found


def exponent(rows: Sequence[dict[str, Any]], key: str) -> float:
    """x in "grows with the tokens as N^x", from the first to the last row."""
    first, last = rows[0], rows[-1]
    return math.log(last[key] / first[key]) / math.log(last["tokens"] / first["tokens"])


def _timed_pair(baseline: str, agent: str, size: int, timing: Timing) -> dict[str, Any]:
    """Time two models in turn; the speed-up is the median of the rounds' own ratios, None of one round."""
    torch.manual_seed(0)
    image = torch.randn(timing.batch, 3, size, size).to(timing.device, timing.dtype)
    # Built outside inference mode, as a user's model is.
    calls = [_call(build(name, size, timing.device, timing.dtype), image) for name in (baseline, agent)]
    with torch.inference_mode():
        for call in calls:
            call()
        laps = [[_seconds(call, timing) for call in calls] for _ in range(timing.rounds)]
    by_model = list(zip(*laps))
    ratios = [first / second for first, second in laps]
    several = len(ratios) >= FEWEST
    low, high = _quartiles(ratios)
    return {
        "baseline": baseline,
        "agent": agent,
        "size": size,
        "baseline_ms": 1000 * statistics.median(by_model[0]) / timing.batch,
        "agent_ms": 1000 * statistics.median(by_model[1]) / timing.batch,
        "speedup": statistics.median(ratios) if several else None,
        "speedup_quartiles": [low, high] if several else None,
        "unstable": high / low > STABLE,  # of the rounds' ratios, upper over lower quartile
    }


def _call(model: torch.nn.Module, image: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(image)


def _seconds(call: Callable[[], Any], timing: Timing) -> float:
    now = time.perf_counter if timing.clock == "wall" else time.process_time
    _wait(timing.device)
    start = now()
    call()
    _wait(timing.device)
    return now() - start


def _wait(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
