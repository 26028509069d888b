"""costs_of, measure_times: time of a UNet call over the unpatched one, and its multiply-adds in Stable Diffusion."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel

import agentsd
from agentsd import AgentConfig, Phase
from agentsd.files import write_atomically
from agentsd.images.rounds import FEWEST, rotated
from agentsd.report import Report
from eval.common.files import read_json
from eval.common.models import ARCHITECTURES
from eval.common.protocol import SD, Scenario
from eval.common.scenarios import use_scenario

from .judged import Inputs, Judged
from .settings import name_of

TIMED_BATCH = 4
SIZE = 512
"""Height and width in pixels that the multiply-adds of Stable Diffusion 1.5 are counted at."""


@dataclass(frozen=True)
class Cost:
    """What one UNet call costs in the phase that a scenario is measured in.

    Attributes:
        time: of a call over that of the unpatched call, 1 for as long; None where it was not timed, or
            in one round.
        spread: half the distance of the quartiles of that ratio over the rounds.
        multiply_adds: of the patched self-attention layers of Stable Diffusion 1.5 at 512 px, one image.
        unet: multiply-adds of that whole UNet over those of the unpatched one. Both None for what is no real method.
    """

    time: float | None = None
    spread: float | None = None
    multiply_adds: int | None = None
    unet: float | None = None


def phase_of(scenario: Scenario) -> Phase:
    """The phase that a scenario is measured in at every timestep."""
    return Phase.AGENT if scenario.method == "agentsd" and scenario.settings.early else Phase.MERGE


def costs_of(scenarios: Sequence[Scenario], times: dict[str, list[float]]) -> dict[str, Cost]:
    """The cost of each scenario, by its name.

    Args:
        times: what `measure_times` returned, or empty.
    """
    return {name_of(scenario): _cost(scenario, times.get(name_of(scenario))) for scenario in scenarios}


def _cost(scenario: Scenario, ratios: list[float] | None) -> Cost:
    time = spread = None
    if ratios and (len(ratios) >= FEWEST or scenario == SD):  # sd is what the others are compared with
        low, time, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        spread = (high - low) / 2
    if scenario.method not in ("sd", "tomesd", "agentsd"):
        return Cost(time, spread)
    # ToMeSD's own code is not counted; it merges as the later phase does.
    report, phase = _described(scenario.config or AgentConfig(ratio=0.0, early=0.0)), phase_of(scenario)
    return Cost(time, spread, report.self_attention_multiply_adds(phase), report.unet_fraction(phase))


@functools.cache
def _described(config: AgentConfig) -> Report:
    with torch.device("meta"):  # shapes alone: nothing is computed
        unet = UNet2DConditionModel(**ARCHITECTURES["sd15"]["unet"])
    with agentsd.patched(unet, config):
        return agentsd.describe(unet, SIZE, SIZE)


def measure_times(
    judged: Judged,
    inputs: Inputs,
    scenarios: Sequence[Scenario],
    timestep: int,
    rounds: int,
    out: Path,
    code: Callable[[Scenario], str],
) -> dict[str, list[float]]:
    """Time of a UNet call over that of the unpatched call right before it, of each interleaved round, by name.

    A machine whose speed drifts favours none. Times in `out/times.json` from before are kept.

    Args:
        timestep: of the calls; the scenarios do the same at each.
        rounds: 0 measures nothing and returns what there is.
        code: scenario -> a string that changes with the code it runs.
    """
    path = out / "times.json"
    kept = read_json(path) or {}
    missing = [
        scenario
        for scenario in scenarios
        if scenario != SD and kept.get(name_of(scenario), {}).get("code") != code(scenario)
    ]
    if rounds and missing:
        batch = inputs.take([number % len(inputs) for number in range(TIMED_BATCH)])
        found: dict[str, list[float]] = {name_of(scenario): [] for scenario in missing}
        for number in range(rounds + 1):  # the first is a warm-up
            for scenario in rotated(missing, number):
                unpatched, own = (_seconds(judged, batch, one, timestep) for one in (SD, scenario))
                if number:
                    found[name_of(scenario)].append(own / unpatched)
        kept |= {name_of(one): {"code": code(one), "ratios": found[name_of(one)]} for one in missing}
        write_atomically(path, json.dumps(kept, indent=1) + "\n")
    return {"sd": [1.0]} | {name: kept[name]["ratios"] for name in map(name_of, scenarios) if name in kept}


def _seconds(judged: Judged, batch: Inputs, scenario: Scenario, timestep: int) -> float:
    """Seconds of one call; patching, which a user does once, is not in it."""
    with use_scenario(judged.pipe, scenario):
        _wait(judged.device)
        start = time.perf_counter()
        judged.predict_noise(batch.latents, timestep, batch)  # returns to the CPU, so a GPU is done
        return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
