"""warm_up: run a pipeline with one UNet call per phase in use, as the first run of a kind is slower than the rest."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DDIMScheduler

from ..config import DEFAULT_NUM_TRAIN_TIMESTEPS, AgentConfig, Phase
from .generate import Step, run_pipeline
from .methods import config_for, use_method
from .request import Request


def warm_up(
    pipe: Any,
    request: Request,
    method: str = "agentsd",
    config: AgentConfig | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> None:
    """Run the whole pipeline with the fewest UNet calls that go through every phase in use.

    One step per phase, whatever the scheduler and the settings; with step caching two, for a whole call and a cached
    one. Its image has no meaning.

    Arguments and errors as `generate`.
    """
    config = config_for(pipe, method, config)
    with use_method(pipe, method, config), one_step_per_phase(pipe, config if method == "agentsd" else None) as steps:
        run_pipeline(pipe, dataclasses.replace(request, steps=steps), on_step)


@contextlib.contextmanager
def one_step_per_phase(pipe: Any, config: AgentConfig | None) -> Iterator[int]:
    """Give a pipeline a scheduler with one timestep per phase for the length of a `with` block.

    Args:
        pipe: a pipeline with a UNet, patched or not.
        config: settings of the patch; None for a method without phases.

    Yields:
        The number of steps to run it with.
    """
    scheduler = pipe.scheduler
    length = scheduler.config.get("num_train_timesteps") or DEFAULT_NUM_TRAIN_TIMESTEPS
    timesteps = warm_up_timesteps(config, length)
    # Of the usual dtype: another would be another graph for a compiled UNet.
    dtype = getattr(getattr(scheduler, "timesteps", None), "dtype", torch.int64)
    # Past the pipeline's own setter, which records the class of its parts for save_pretrained.
    vars(pipe)["scheduler"] = _FixedTimesteps(timesteps, dtype, length)
    try:
        yield len(timesteps)
    finally:
        vars(pipe)["scheduler"] = scheduler


def warm_up_timesteps(config: AgentConfig | None, num_train_timesteps: int) -> list[int]:
    """Falling timesteps that go through every phase which the settings use; a single one where there is no patch."""
    if config is None:
        return [num_train_timesteps - 1]
    calls = 1 if config.cache_interval == 1 else 2  # with step caching a whole call and a cached one
    highest = {Phase.AGENT: num_train_timesteps - 1, Phase.MERGE: calls - 1}
    timesteps = []
    for phase, top in highest.items():
        candidates = [top - call for call in range(calls)]
        timesteps += [t for t in candidates if t >= 0 and config.phase_at(t, num_train_timesteps) is phase]
    return timesteps


class _FixedTimesteps(DDIMScheduler):
    """A scheduler with given timesteps whose steps leave the latents as they are."""

    def __init__(self, timesteps: list[int], dtype: torch.dtype, num_train_timesteps: int):
        super().__init__(num_train_timesteps=num_train_timesteps)
        # Apart, so that step caching does not know the run, of too few steps to cache: it goes by the interval alone.
        self._fixed = [torch.tensor(timestep, dtype=dtype) for timestep in timesteps]

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **kwargs: Any) -> None:
        self.num_inference_steps = num_inference_steps
        self.timesteps = [timestep.to(device) for timestep in self._fixed]

    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return sample, sample
