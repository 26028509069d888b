"""The calls whose time is forecast: diffusers' UNets of real size on the meta device, unpatched, patched and cached."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import tomesd
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import PNDMScheduler, UNet2DConditionModel
from torch import Tensor

import agentsd
from agentsd.config import AgentConfig, Phase
from agentsd.images.unet_calls import RandomInputs, first_of_each_phase, ran_whole, set_timesteps

from ..common.models import ARCHITECTURES
from .tracing import CallTrace, trace

STEPS = 50
"""PLMS steps of a run, which call the UNet 51 times."""
_ENOUGH_CALLS = 12  # of one phase, until whole and cached ones were traced

CallKind = tuple[Phase, bool]
"""A call's phase, and whether it is whole."""


@dataclass(frozen=True)
class Shape:
    """What a UNet is called with.

    Attributes:
        architecture: a key of ARCHITECTURES: "sd15", "sd21", "sdxl".
        size: pixels a side.
        images: guidance doubles them in the UNet.
    """

    architecture: str
    size: int
    images: int = 1

    def __str__(self) -> str:
        name = {"sd15": "SD 1.5", "sd21": "SD 2.1", "sdxl": "SDXL"}.get(self.architecture, self.architecture)
        return f"{name}, {self.size} px" + ("" if self.images == 1 else f", {self.images} images")


@dataclass(eq=False)
class Parts:
    """What of a pipeline the methods look at."""

    unet: Any
    scheduler: Any


class Network:
    """A UNet on the meta device in float16, with inputs of a shape.

    Args:
        shape: of the calls.
        config: arguments of UNet2DConditionModel in place of the architecture's.
    """

    def __init__(self, shape: Shape, config: dict[str, Any] | None = None):
        self.shape = shape
        with torch.device("meta"), _quiet():
            unet = UNet2DConditionModel(**(config or ARCHITECTURES[shape.architecture]["unet"])).to(torch.float16)
        self.unet = unet.eval()
        self.scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
        self.parts = Parts(self.unet, self.scheduler)
        inputs = RandomInputs.of(self.unet, shape.size // 8, shape.size // 8, shape.images)
        self.sample, self.inputs = torch.cat([inputs.latents] * 2), inputs.others

    def call(self, timestep: Any) -> CallTrace:
        """Trace one UNet call at a timestep that lies on the CPU."""
        there = timestep if isinstance(timestep, Tensor) else None
        return trace(lambda: self.unet(self.sample, timestep, return_dict=False, **self.inputs), self.unet, there)

    def unpatched(self) -> CallTrace:
        """A call of the model as it is."""
        return self.call(self._timesteps()[0])

    def with_tomesd(self, ratio: float) -> CallTrace:
        """A call with ToMeSD at its defaults."""
        tomesd.apply_patch(self.unet, ratio=ratio)
        try:
            return self.call(self._timesteps()[0])
        finally:
            tomesd.remove_patch(self.unet)

    def with_deepcache(self) -> tuple[CallTrace, CallTrace]:
        """A whole and a cached call with DeepCache at its defaults."""
        helper = DeepCacheSDHelper(pipe=self.parts)
        helper.set_params(cache_interval=5)
        timesteps = self._timesteps()
        helper.enable()
        try:
            return self.call(timesteps[0]), self.call(timesteps[4])  # PLMS repeats its second timestep
        finally:
            helper.disable()

    def with_agentsd(self, settings: dict[str, Any]) -> dict[CallKind, CallTrace]:
        """Calls with the patch, by kind.

        The settings' own interval does not change what a call costs: with step caching it is 2 here.
        """
        caches = settings.get("cache_interval", 1) > 1
        config = AgentConfig(**{**settings, "cache_interval": 2 if caches else 1})
        found: dict[CallKind, CallTrace] = {}
        with warnings.catch_warnings(), agentsd.patched(self.parts, config):
            warnings.simplefilter("ignore")
            for phase, begin in first_of_each_phase(config, self._timesteps().tolist(), 1000).items():
                seen: list[bool] = []
                for timestep in self._timesteps()[begin : begin + _ENOUGH_CALLS]:
                    with ran_whole(self.unet) as whole:
                        call = self.call(timestep)
                    seen.append(whole())
                    # The last of each kind: a run's first whole call and first cached one differ a little.
                    found[phase, seen[-1]] = call
                    if not caches or (seen.count(True) > 1 and not seen[-1]):
                        break
        return found

    def _timesteps(self) -> Tensor:
        """The timesteps of a new run, on the CPU."""
        return set_timesteps(self.scheduler, STEPS)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out diffusers' advice on data types, which is about trained weights."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(before)
