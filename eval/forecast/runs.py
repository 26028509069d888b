"""The runs that are forecast: settings by name, what their calls cost, and how many of each kind they make."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import PNDMScheduler

from agentsd.config import PRESETS, AgentConfig, Phase
from agentsd.images.unet_calls import plan_of_run

from .gpus import GPU, Host
from .hooks import hook_seconds
from .networks import STEPS, CallKind, Network, Shape
from .roofline import call_seconds
from .tracing import CallTrace

CACHING_ALONE = {"ratio": 0.0, "early": 0.0}
RUNS: dict[str, dict[str, Any]] = {
    "agents": {},
    "agents from a grid": {"agents": "grid"},
    "interval 3": {"cache_interval": 3},
    "interval 5": {"cache_interval": 5},
    "caching alone, 3": {**CACHING_ALONE, "cache_interval": 3},
    "caching alone, 5": {**CACHING_ALONE, "cache_interval": 5},
}
RUNS |= {f'preset "{name}"': dict(fields) for name, fields in PRESETS.items() if fields not in RUNS.values()}
"""Settings by name: the defaults, intervals, step caching with nothing merged, and the presets not among these."""


@dataclass(frozen=True)
class Costs:
    """What the calls of one network cost: traced, and the host's time in their hooks.

    Attributes:
        unpatched: a call of the model as it is.
        calls: of each run of RUNS, by kind.
        hooks: seconds, on the machine that measured them, of each run's calls by kind.
        plans: how many calls of each kind each run has.
    """

    unpatched: CallTrace
    calls: dict[str, dict[CallKind, CallTrace]]
    hooks: dict[str, dict[CallKind, float]]
    plans: dict[str, Counter[CallKind]]

    def speed_up(self, run: str, gpu: GPU, host: Host, mode: str) -> float:
        """Seconds of a run's UNet calls unpatched, over those patched."""
        plan = self.plans[run]
        base = call_seconds(self.unpatched, gpu, host, mode).total
        return plan.total() * base / sum(count * self.call(run, kind, gpu, host, mode) for kind, count in plan.items())

    def call(self, run: str, kind: CallKind, gpu: GPU, host: Host, mode: str) -> float:
        """Seconds of one call of a run."""
        call, hooks = _of_kind(self.calls[run], kind), _of_kind(self.hooks[run], kind)
        return call_seconds(call, gpu, host, mode, hooks).total


def _of_kind(by_kind: dict[CallKind, Any], kind: CallKind) -> Any:
    """What belongs to a kind of call; where a phase had none of it, the other phase's of that kind."""
    phase, whole = kind
    other = Phase.MERGE if phase is Phase.AGENT else Phase.AGENT
    return by_kind[kind] if kind in by_kind else by_kind[other, whole]


def costs_of(
    shape: Shape,
    hooks: float | None = None,
    runs: dict[str, dict[str, Any]] | None = None,
    network_of: Callable[[Shape], Network] = Network,
    say: Callable[[str], None] = lambda text: None,
) -> Costs:
    """Trace, measure and count what the runs of a network cost.

    Args:
        shape: of the calls.
        hooks: seconds of the host in the hooks of a call; None measures them here.
        runs: settings by name; None takes RUNS.
        network_of: makes the network of a shape.
        say: called with what is traced.
    """
    runs = RUNS if runs is None else runs
    network = network_of(shape)
    say(f"{shape}, unpatched")
    unpatched = network.unpatched()
    traced: dict[str, dict[CallKind, CallTrace]] = {}
    calls, taken = {}, {}
    for name, settings in runs.items():
        key = repr(sorted({**settings, "cache_interval": settings.get("cache_interval", 1) > 1}.items()))
        if key not in traced:
            say(f"{shape}, {name}")
            traced[key] = network.with_agentsd(settings)
        calls[name] = traced[key]
        if hooks is None:
            taken[name] = _measured_hooks(shape.architecture, key, **settings)
        else:
            taken[name] = dict.fromkeys(calls[name], hooks)
    return Costs(unpatched, calls, taken, {name: plan(settings) for name, settings in runs.items()})


_HOOK_RUNS = 3  # where other programs run, the least of one run's calls is too much
_MEASURED: dict[tuple[str, str], dict[CallKind, float]] = {}


def _measured_hooks(architecture: str, key: str, **settings: Any) -> dict[CallKind, float]:
    if (architecture, key) not in _MEASURED:
        found = [hook_seconds(architecture, settings) for _ in range(_HOOK_RUNS)]
        _MEASURED[architecture, key] = {kind: min(one[kind] for one in found) for kind in found[0]}
    return _MEASURED[architecture, key]


def plan(settings: dict[str, Any]) -> Counter[CallKind]:
    """The calls of a run of PLMS steps, by kind."""
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plan_of_run(scheduler, AgentConfig(**settings), STEPS)
