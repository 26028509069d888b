"""hook_seconds: the host's time in the patch's hooks around a UNet call, measured on this machine's CPU."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from typing import Any

import torch
from diffusers import PNDMScheduler, UNet2DConditionModel
from torch import nn

import agentsd
from agentsd.config import AgentConfig
from agentsd.images.unet_calls import RandomInputs, set_timesteps, timed_calls

from ..common.models import ARCHITECTURES
from .networks import STEPS, CallKind, Parts

_WIDTH = 32  # channels: as many layers as the real network, and next to no arithmetic


def hook_seconds(architecture: str, settings: dict[str, Any], steps: int = STEPS) -> dict[CallKind, float]:
    """Seconds of this thread's CPU time in the UNet's hooks, before and after a call, by kind of call.

    The least of a run's calls, as other work of the machine only adds. On a UNet of the architecture's layers, but of
    few channels and small latents. The few operators in the hooks are in the traces too, and count twice.

    Args:
        architecture: a key of ARCHITECTURES.
        settings: of the patch.
        steps: of the run.
    """
    unet = narrow_unet(ARCHITECTURES[architecture]["unet"])
    pipe = Parts(unet, PNDMScheduler(skip_prk_steps=True, steps_offset=1))
    config = AgentConfig(**settings)
    found: defaultdict[CallKind, list[float]] = defaultdict(list)
    with warnings.catch_warnings(), _Stopwatch(unet) as watch:
        warnings.simplefilter("ignore")
        with agentsd.patched(pipe, config):
            watch.surround()
            timesteps = set_timesteps(pipe.scheduler, steps)
            for call in timed_calls(unet, pipe.scheduler, timesteps, RandomInputs.of(unet, 16, 16)):
                found[config.phase_at(call.timestep), call.whole].append(watch.taken())
    return {kind: min(seconds) for kind, seconds in found.items()}


def narrow_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """A UNet with the layers of a configuration and few channels."""
    levels = len(config["block_out_channels"])
    narrow = dict(
        block_out_channels=(_WIDTH,) * levels, cross_attention_dim=16, attention_head_dim=4, norm_num_groups=8,
        sample_size=16,
    )  # fmt: skip
    if "projection_class_embeddings_input_dim" in config:
        narrow["projection_class_embeddings_input_dim"] = 16 + 6 * config["addition_time_embed_dim"]
    with torch.random.fork_rng(devices=[]):
        return UNet2DConditionModel(**{**config, **narrow}).eval()


class _Stopwatch:
    """Times a module's hooks: from the first pre-hook to the last, and from the first hook after to the last."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.handles: list[Any] = []
        self.total = self.began = 0.0

    def __enter__(self) -> _Stopwatch:
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def surround(self) -> None:
        """Stand before and behind the hooks that are on the module now."""

        def begin(*_: Any) -> None:
            self.began = time.thread_time()

        def end(*_: Any) -> None:
            self.total += time.thread_time() - self.began

        self.handles = [
            self.module.register_forward_pre_hook(begin, prepend=True),
            self.module.register_forward_pre_hook(end),
            self.module.register_forward_hook(begin, prepend=True),
            self.module.register_forward_hook(end),
        ]

    def taken(self) -> float:
        """Seconds since this was last asked."""
        total, self.total = self.total, 0.0
        return total
