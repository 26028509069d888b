"""Skips most of a pipeline's ControlNet where the UNet call after it will be cached.

Such a call reads the residuals of the few pairs that it recomputes, which need the ControlNet's first layers alone: the
image is the same, bit for bit. The ControlNet runs before the UNet has decided, so the decision is foreseen from the
position in the run, which both are called with. Where it turns out otherwise, as after a change of what conditions the
UNet alone, the ControlNet runs whole before the UNet goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, SparseControlNetModel
from torch import Tensor, nn

from ..config import AgentConfig
from .conditioning import by_name
from .layers import UNet
from .sampling_run import Run, RunTracker
from .schedule import Schedule
from .skipping import Switch, first_layers_apart, install_forward, skippable_forwards, skipped_parts
from .weak_link import WeakLink

# Classes whose first residual is what conv_in and the embedding of the control image give, and the next ones those of
# the first down block's pairs.
_CONTROLNETS = (ControlNetModel, ControlNetUnionModel, SparseControlNetModel)


class _Skipped(NamedTuple):
    """A ControlNet call that was skipped: the run, the call to make it whole, and its residuals, in part stand-ins."""

    run: Run
    make: Callable[[], Any]
    residuals: list[Tensor]


class ControlNetSkip(Switch):
    """On a ControlNet, or on several that a pipeline adds up: decides before each call whether most of it is skipped.

    Args:
        config, schedule, runs: of the patch of the UNet that is called after it.
        pipeline: owns the ControlNet, and may get another one; or anything without an attribute `controlnet`.
    """

    filler = math.nan  # stands in skipped residuals. A cached call reads none of them; anything else would show

    def __init__(self, config: AgentConfig, schedule: Schedule, runs: RunTracker, pipeline: Any):
        super().__init__()
        self._config = config
        self._schedule = schedule
        self._runs = runs
        self._pipeline = WeakLink(pipeline)
        self._installed: WeakLink[nn.Module] = WeakLink(None)
        self._making_whole = False
        self._run: Run | None = None  # in which the call in progress is skipped
        self._skipped: _Skipped | None = None
        self._handles: list[Any] = []

    def install(self, unet: UNet, depth: int | str) -> None:
        """Wrap what a cached UNet call reads nothing of in the ControlNet that the pipeline has now.

        A former patch's wrapping is taken off. A ControlNet of another kind is left alone, and so is one whose middle
        residual a cached call reads: where that recomputes all up blocks.
        """
        controlnet = getattr(self._pipeline(), "controlnet", None)
        keeps_middle = skipped_parts(unet, depth)[1] is unet.mid_block
        if not isinstance(controlnet, nn.Module) or keeps_middle or not (nets := _nets(controlnet)):
            return
        for owner in [forward.switch for forward in skippable_forwards(controlnet)]:
            if isinstance(owner, ControlNetSkip):
                owner._take_off(controlnet)
        for part in (part for net in nets for part in _skipped_parts(net, depth)):
            install_forward(part, self)
        self._handles = [
            controlnet.register_forward_pre_hook(self._before_call, with_kwargs=True),
            controlnet.register_forward_hook(self._after_call, with_kwargs=True, always_call=True),
        ]
        self._installed = WeakLink(controlnet)

    def uninstall(self) -> None:
        """Undo `install`, also where the pipeline has another ControlNet by now, or is a copy."""
        if (controlnet := self._controlnet()) is not None:
            self._take_off(controlnet)

    def skips(self) -> bool:
        """Whether the ControlNet that is in use is skipped in cached calls."""
        pipeline, controlnet = self._pipeline(), self._controlnet()
        used = controlnet if pipeline is None else getattr(pipeline, "controlnet", None)
        return controlnet is not None and controlnet is used and not _compiled(controlnet)

    def settle(self, unet: UNet, args: tuple, kwargs: dict, cached: bool) -> None:
        """Make a skipped ControlNet call whole if the UNet call that begins is not cached.

        It may serve several UNet calls, so it is kept until the ControlNet is called again or the run ends.

        Args:
            unet, args, kwargs: of the UNet call.
            cached: what was decided for it.

        Raises:
            RuntimeError: its residuals are not the ControlNet's own tensors, which could be filled in.
        """
        if (skipped := self._skipped) is None or cached:
            return
        self._skipped = None
        inputs = by_name(unet, args, kwargs)
        given = [*(inputs.get("down_block_additional_residuals") or ()), inputs.get("mid_block_additional_residual")]
        own = {id(tensor) for tensor in skipped.residuals}
        of_this_run = skipped.run is self._runs.run or any(id(one) in own for one in given)
        if all(one is None for one in given) or not of_this_run:
            return
        if [id(one) for one in given] != [id(one) for one in skipped.residuals]:
            raise RuntimeError(
                "agentsd: step caching expected a cached UNet call and skipped the ControlNet before it. The call is "
                "whole, as what conditions the UNet has changed, and its residuals are not those that the ControlNet "
                "returned. Use cache_interval=1, or patch the UNet without its pipeline: "
                "agentsd.apply_patch(pipe.unet, …) leaves the ControlNet alone"
            )
        self._making_whole = True
        try:
            with torch.no_grad():
                for stand_in, tensor in zip(skipped.residuals, _residuals(skipped.make())):
                    stand_in.copy_(tensor)
        finally:
            self._making_whole = False

    def forget(self) -> None:
        """Let go of the last call, as the run has ended."""
        self._skipped = None

    def _foresee(self, timestep: Tensor | float) -> Run | None:
        """The run in progress, if its next call, at this timestep, will be cached unless something else changes."""
        run = self._runs.run
        if run is None or run.loop is None or run.cache is None or run.whole or torch.is_grad_enabled():
            return None
        position = run.loop.position(timestep) if isinstance(timestep, Tensor) else None
        if position is None:
            return None
        phase = self._config.phase_at(run.loop.timesteps[position], self._schedule.num_train_timesteps)
        return run if run.cache.expects_cached(position, phase) else None

    def _before_call(self, controlnet: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling() or self._making_whole:
            return
        self._skipped = self._run = None
        inputs = by_name(controlnet, args, kwargs)
        # In guess mode pipelines make other tensors of the residuals, so that they could not be filled in.
        if not _compiled(controlnet) and not inputs.get("guess_mode"):
            self._run = self._foresee(inputs["timestep"])
        self.skipping = self._run is not None

    def _after_call(self, controlnet: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if torch.compiler.is_compiling() or self._making_whole:
            return
        if self._run is not None and output is not None:
            self._skipped = _Skipped(self._run, partial(controlnet, *args, **kwargs), _residuals(output))
        self._run, self.skipping = None, False

    def _take_off(self, controlnet: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._skipped = [], None
        for forward in skippable_forwards(controlnet):
            if forward.switch is self:
                forward.remove()

    def _controlnet(self) -> nn.Module | None:
        """What this was put on; the pipeline's where that is a copy.

        The pipeline may be gone, as after `pipe = OtherPipeline.from_pipe(pipe)`.
        """
        for controlnet in (self._installed(), getattr(self._pipeline(), "controlnet", None)):
            if isinstance(controlnet, nn.Module):
                if any(forward.switch is self for forward in skippable_forwards(controlnet)):
                    return controlnet
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_run": None, "_skipped": None}


def _nets(controlnet: nn.Module) -> list[nn.Module]:
    """The ControlNets of a pipeline's attribute; none where one is of a kind that is not known here."""
    nets = list(getattr(controlnet, "nets", [controlnet]))
    return nets if all(type(net) in _CONTROLNETS for net in nets) else []


def _compiled(controlnet: nn.Module) -> bool:
    """Whether a graph is run, in which the decision would be frozen."""
    return any(module._compiled_call_impl is not None for module in (controlnet, *_nets(controlnet)))


def _skipped_parts(controlnet: Any, depth: int | str) -> list[nn.Module]:
    """What a cached UNet call reads nothing of: layers, and the convolutions that make residuals of their outputs."""
    depth = 1 if isinstance(depth, str) else depth
    parts = [*first_layers_apart(controlnet, depth), *controlnet.down_blocks[1:]]
    if controlnet.mid_block is not None:
        parts.append(controlnet.mid_block)
    return [*parts, *controlnet.controlnet_down_blocks[depth:], controlnet.controlnet_mid_block]


def _residuals(output: Any) -> list[Tensor]:
    down, mid = (output[0], output[1]) if isinstance(output, tuple) else output.to_tuple()
    return [*down, mid]
