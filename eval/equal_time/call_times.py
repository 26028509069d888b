"""What a UNet call of each kind takes, in calls of the unpatched UNet: measured on a CPU, forecast for GPUs."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from agentsd.config import PRESETS, AgentConfig
from eval.common.files import read_json
from eval.common.protocol import BenchError

from .rows import FEWER_STEPS, NOTHING_MERGED, TOMESD_RATIO, Row

STORED = Path(__file__).parents[1] / "results" / "pareto" / "call-times.json"
CPU = "CPU"
GPUS_SHOWN = ("RTX 3060", "RTX 4090", "A100")
_MEASURED = Path(__file__).parents[1] / "results" / "step-caching" / "sd15-512.json"
_HOOKS = 0.3e-3  # seconds of the host in the patch's hooks of a call

_FAMILIES: dict[str, dict[str, Any]] = {"cache alone": NOTHING_MERGED, "agents": {}, "large": PRESETS["large"]}

CallTimes = dict[str, dict[str, dict[str, float]]]
"""Machine -> family of settings -> kind of call ("whole, agent") -> its time in calls of the unpatched UNet."""


def load() -> CallTimes:
    """The stored times. Raises BenchError where the file is damaged or missing."""
    stored = read_json(STORED)
    if stored is None:
        raise BenchError(f"{STORED} is missing: make it by --call-times")
    return stored


def store() -> None:
    """Read what call_bench measured of SD 1.5's UNet at 512 px, forecast the GPUs' times, and store both."""
    text = json.dumps({CPU: _measured(), **_forecast()}, indent=1)
    STORED.parent.mkdir(parents=True, exist_ok=True)
    STORED.write_text(text + "\n", encoding="utf-8")


def time_of(row: Row, calls: dict[str, float], machine: dict[str, dict[str, float]]) -> float:
    """The time of a row's UNet calls, in calls of the unpatched UNet.

    Args:
        row: how the calls were made.
        calls: how many there were of each kind.
        machine: of CallTimes.
    """
    if row.kind == FEWER_STEPS:
        return sum(calls.values())
    return sum(count * machine[family_of(row)][kind] for kind, count in calls.items())


def family_of(row: Row) -> str:
    """Whose calls take as long as a row's: settings of agentsd take one of three, whatever else they set."""
    if row.kind != "agentsd":
        return row.kind
    config = AgentConfig(**row.fields)
    if config.ratio == config.early == 0:
        return "cache alone"
    return "large" if config.late == "downsample" else "agents"


def _kind(whole: bool, phase: str) -> str:
    return f"{'whole' if whole else 'cached'}, {phase}"


def _measured() -> dict[str, dict[str, float]]:
    seconds = {name: statistics.median(values) for name, values in json.loads(_MEASURED.read_text())["seconds"].items()}
    found: dict[str, dict[str, float]] = {}
    for family in _FAMILIES:
        found[family] = {
            _kind(whole, phase): round(seconds[f"{family}, {_kind(whole, phase)}"] / seconds["sdpa"], 4)
            for whole in (True, False)
            for phase in ("agent", "merge")
        }
    # DeepCache skips what a cached call of ours with nothing merged skips.
    found["deepcache"] = {kind: 1.0 if "whole" in kind else share for kind, share in found["cache alone"].items()}
    found["tomesd"] = dict.fromkeys(("whole, merge", "whole, agent"), round(seconds["ToMeSD"] / seconds["sdpa"], 4))
    return found


def _forecast() -> CallTimes:
    from agentsd.config import Phase
    from eval.forecast.gpus import FAST_HOST, GPUS
    from eval.forecast.networks import Network, Shape
    from eval.forecast.roofline import EAGER, call_seconds
    from eval.forecast.runs import costs_of

    shape = Shape("sd15", 512)
    network = Network(shape)
    runs = {name: {**fields, "cache_interval": 2} for name, fields in _FAMILIES.items()}
    costs = costs_of(shape, _HOOKS, runs)
    tomesd, deepcache = network.with_tomesd(TOMESD_RATIO), network.with_deepcache()
    found: CallTimes = {}
    for name in GPUS_SHOWN:
        seconds = lambda call, name=name: call_seconds(call, GPUS[name], FAST_HOST, EAGER).total  # noqa: E731
        base = seconds(costs.unpatched)
        machine = found[name] = {}
        for family in _FAMILIES:
            machine[family] = {
                _kind(whole, phase.value): round(
                    costs.call(family, (phase, whole), GPUS[name], FAST_HOST, EAGER) / base, 4
                )
                for whole in (True, False)
                for phase in Phase
            }
        machine["deepcache"] = {
            _kind(whole, phase.value): round(seconds(call) / base, 4)
            for whole, call in zip((True, False), deepcache)
            for phase in Phase
        }
        machine["tomesd"] = {_kind(True, phase.value): round(seconds(tomesd) / base, 4) for phase in Phase}
    return found
