"""Stages throughput and growth: models timed in turn, so that a busy machine slows both of a pair alike."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .counts import count
from .models import build
from .paper import PAIRS, Pair

_UNSTABLE = 1.15
"""Rounds that differ by more than this factor (upper over lower quartile) make a timing unstable."""


def throughput(
    pairs: Sequence[Pair], sizes: Sequence[int], batch: int, rounds: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """One row per pair and size."""
    found = []
    for size in sizes:
        for pair in pairs:
            print(f"{pair.agent} against {pair.baseline} at {size} …", file=sys.stderr)
            row = _timed_pair(pair.baseline, pair.agent, size, batch, rounds, device, dtype)
            found.append({**row, "why": pair.why})
    return found


def growth(
    sizes: Sequence[int], batch: int, rounds: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Agent-DeiT-T against DeiT-T by image size, with the multiply-adds of both."""
    pair = PAIRS["small"][0]
    found = []
    for size in sizes:
        print(f"{pair.agent} against {pair.baseline} at {size} …", file=sys.stderr)
        row = _timed_pair(pair.baseline, pair.agent, size, batch, rounds, device, dtype)
        gmacs = {f"{kind}_gmacs": count(getattr(pair, kind), size)[1] for kind in ("baseline", "agent")}
        found.append({**row, **gmacs, "tokens": (size // 16) ** 2})
    return found


def exponent(rows: Sequence[dict[str, Any]], key: str) -> float:
    """x in "grows with the tokens as N^x", from the first to the last row."""
    first, last = rows[0], rows[-1]
    return math.log(last[key] / first[key]) / math.log(last["tokens"] / first["tokens"])


@torch.inference_mode()
def _timed_pair(
    baseline: str, agent: str, size: int, batch: int, rounds: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Time two models in turn; the speed-up is the median over the rounds of each round's own ratio."""
    torch.manual_seed(0)
    image = torch.randn(batch, 3, size, size).to(device, dtype)
    calls = [_call(build(name, size, device, dtype), image) for name in (baseline, agent)]
    for call in calls:
        call()
    laps = [[_seconds(call, device) for call in calls] for _ in range(rounds)]
    by_model = list(zip(*laps))
    ratios = [first / second for first, second in laps]
    low, high = _quartiles(ratios)
    return {
        "baseline": baseline,
        "agent": agent,
        "size": size,
        "baseline_ms": 1000 * statistics.median(by_model[0]) / batch,
        "agent_ms": 1000 * statistics.median(by_model[1]) / batch,
        "speedup": statistics.median(ratios),
        "speedup_quartiles": [low, high],
        "unstable": high / low > _UNSTABLE,
    }


def _call(model: torch.nn.Module, image: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(image)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
