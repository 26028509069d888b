"""Fewer steps as a fair control: they begin at the full run's first noise level, and take as long as a method does.

With diffusers' "leading" spacing, which Stable Diffusion's own configuration has, another number of steps begins at
another noise level: 25 DDIM steps at t = 961, 9 at 889. The same noise is then another image, and *fewer steps* look
worse than they are. Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv 2305.08891).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers

from agentsd.images.names import SCHEDULERS
from agentsd.images.pipelines import set_scheduler

from .protocol import BenchError

_KARRAS = {"use_karras_sigmas": True}

FAIR_SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("ddim", {"timestep_spacing": "trailing"}),
    "plms": ("plms", {"timestep_spacing": "trailing"}),
    "euler": ("euler", {"timestep_spacing": "trailing"}),
    "euler-karras": ("euler", {"timestep_spacing": "linspace", **_KARRAS}),
    "dpm++2m": ("dpm++2m", {"timestep_spacing": "linspace"}),
    "dpm++2m-karras": ("dpm++2m", {"timestep_spacing": "linspace", **_KARRAS}),
    "unipc": ("unipc", {"timestep_spacing": "linspace"}),
}
"""Name: the scheduler's name in agentsd, and what to change in its settings. All begin at t = 999 of 1,000."""


CACHED_CALL = 0.12
"""Time of a cached call in whole ones: measured on a CPU and forecast for an A100, SD 1.5 at 512 px, nothing merged."""


def steps_of_equal_time(calls: int, whole: int) -> int:
    """How many unpatched steps take as long as `calls` UNet calls of which `whole` are whole and the others cached."""
    return round(whole + CACHED_CALL * (calls - whole))


def check_fair(name: str) -> None:
    """Raise BenchError as `set_fair_schedule`."""
    if name not in FAIR_SCHEDULES:
        has = "has no schedule here that begins alike for all steps" if name in SCHEDULERS else "is unknown"
        raise BenchError(f"scheduler {name!r} {has}: use {', '.join(FAIR_SCHEDULES)}")


def set_fair_schedule(pipe: Any, name: str) -> None:
    """Give a pipeline a scheduler that begins at one noise level for all numbers of steps.

    Raises:
        BenchError: an unknown name, or one of which no fair schedule is known.
    """
    check_fair(name)
    scheduler, changes = FAIR_SCHEDULES[name]
    set_scheduler(pipe, scheduler)
    pipe.scheduler = getattr(diffusers, type(pipe.scheduler).__name__).from_config(pipe.scheduler.config, **changes)


@dataclass(frozen=True)
class Run:
    """A scheduler and its number of steps."""

    schedule: str
    steps: int

    @property
    def name(self) -> str:
        return f"{self.schedule}, {self.steps} steps"


def parse_runs(texts: list[str]) -> list[Run]:
    """["ddim:25"] to runs. Raises BenchError for a schedule that is not known, or no number of steps."""
    found = []
    for text in texts:
        name, _, steps = text.partition(":")
        if name not in FAIR_SCHEDULES or not steps.isdigit() or not 4 <= int(steps) <= 200:
            raise BenchError(
                f"--runs {text!r}: must be NAME:STEPS with 4 … 200 steps, NAME of {', '.join(FAIR_SCHEDULES)}"
            )
        found.append(Run(name, int(steps)))
    return found
