"""Skips most of a pipeline's ControlNet where the UNet call after it will be cached.

Such a call reads the residuals of the few pairs that it recomputes, which need the ControlNet's first layers alone: the
image is the same, bit for bit. The ControlNet runs before the UNet has decided, so the decision is foreseen from the
same timestep and state. Where it turns out otherwise, as after a change of what conditions the UNet alone, the
ControlNet runs whole before the UNet goes on.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, SparseControlNetModel
from torch import Tensor, nn

from .conditioning import Conditioning
from .inputs import by_name, read_timesteps
from .layers import UNet
from .skipping import first_layers_apart, install_forward, skippable_forwards
from .step_cache import LEAST_SIMILARITY, latent_similarity
from .weak_link import WeakLink

if TYPE_CHECKING:
    from .installation import Installation

_ATTRIBUTE = "_agentsd_skip"

# Classes whose first residual is what conv_in and the embedding of the control image give, and the next ones those of
# the first down block's pairs.
_CONTROLNETS = (ControlNetModel, ControlNetUnionModel, SparseControlNetModel)


@dataclasses.dataclass
class _Call:
    """A ControlNet call.

    Attributes:
        timestep, conditioning, sample: of the call; the last is a copy of the latent.
        controls: its control images. A pipeline makes new tensors of them for each run.
        answered: the patched UNet was called after it.
    """

    timestep: float
    conditioning: Conditioning
    sample: Tensor
    controls: list[Any]
    answered: bool = False


@dataclasses.dataclass
class _Skipped:
    """A ControlNet call that was skipped, to be made whole if need be."""

    controlnet: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    outputs: list[Tensor]


class ControlNetSkip:
    """On a ControlNet, or on several that a pipeline adds up: decides before each call whether most of it is skipped.

    Attributes:
        skipping: the call in progress is skipped.
        filler: what stands in skipped residuals. A cached call reads none of them; anything else would show.

    Args:
        patch: the patch of the UNet that is called after it.
    """

    filler = math.nan

    def __init__(self, patch: Installation):
        self.patch = WeakLink(patch)
        self._unet: WeakLink[UNet] = WeakLink(patch.unet)
        self.skipping = False
        self._making_whole = False
        self._last: _Call | None = None
        self._skipped: _Skipped | None = None
        self._handles: list[Any] = []

    def install(self, controlnet: nn.Module, depth: int | str) -> None:
        """Wrap what a cached UNet call reads nothing of; a former patch's wrapping is taken off."""
        nets = _nets(controlnet)
        owners = {id(forward.cache): forward.cache for net in nets for forward in skippable_forwards(net)}
        for owner in owners.values():
            if isinstance(owner, ControlNetSkip):
                owner.uninstall(controlnet)
        for part in (part for net in nets for part in _skipped_parts(net, depth)):
            install_forward(part, self)
        self._handles = [
            controlnet.register_forward_pre_hook(self._before_call, with_kwargs=True),
            controlnet.register_forward_hook(self._after_call, with_kwargs=True, always_call=True),
        ]
        setattr(controlnet, _ATTRIBUTE, self)

    def uninstall(self, controlnet: nn.Module) -> None:
        """Undo `install`."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._last, self._skipped = [], None, None
        for forward in skippable_forwards(controlnet):
            if forward.cache is self:
                forward.remove()
        if vars(controlnet).get(_ATTRIBUTE) is self:
            delattr(controlnet, _ATTRIBUTE)

    def settle(self, args: tuple, kwargs: dict, cached: bool) -> None:
        """Make a skipped ControlNet call whole if the UNet call that begins is not cached.

        Args:
            args, kwargs: of the UNet call.
            cached: what was decided for it.

        Raises:
            RuntimeError: its residuals are not the ControlNet's own tensors, which could be filled in.
        """
        skipped, self._skipped = self._skipped, None
        if self._last is not None:
            self._last.answered = True
        if skipped is None or cached:
            return
        inputs = by_name(self._unet.target(), args, kwargs)
        given = [*(inputs.get("down_block_additional_residuals") or ()), inputs.get("mid_block_additional_residual")]
        if all(one is None for one in given):
            return
        if len(given) != len(skipped.outputs) or any(one is not other for one, other in zip(given, skipped.outputs)):
            raise RuntimeError(
                "agentsd: step caching expected a cached UNet call and skipped the ControlNet before it. The call is "
                "whole, as what conditions the UNet has changed, and its residuals are not those that the ControlNet "
                "returned. Use cache_interval=1, or patch the UNet without its pipeline: "
                "agentsd.apply_patch(pipe.unet, …) leaves the ControlNet alone"
            )
        self._making_whole = True
        try:
            with torch.no_grad():
                made = skipped.controlnet(*skipped.args, **skipped.kwargs)
                for stand_in, tensor in zip(skipped.outputs, _tensors(made)):
                    stand_in.copy_(tensor)
        finally:
            self._making_whole = False

    def _before_call(self, controlnet: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling() or self._making_whole:
            return
        before, self._last = self._last, None
        self._skipped, self.skipping = None, False
        patch, unet = self.patch(), self._unet()
        inputs = by_name(controlnet, args, kwargs)
        sample, timestep = inputs["sample"], inputs["timestep"]
        if patch is None or unet is None or patch.cache is None or torch.is_grad_enabled():
            return
        # In guess mode pipelines make other tensors of the residuals, so that they could not be filled in.
        if inputs.get("guess_mode") or isinstance(timestep, Tensor) and timestep.numel() != 1:
            return
        conditioning = Conditioning.of_call(controlnet, args, kwargs)
        controls = _as_list(inputs["controlnet_cond"])
        likeness = None
        if before is not None:
            likeness = latent_similarity(conditioning, sample, before.conditioning, before.sample)[None]
        value, similarities = read_timesteps(timestep, likeness)
        assert isinstance(value, float)  # there is one
        goes_on = before is not None and similarities[0] >= LEAST_SIMILARITY
        known = before.conditioning if before is not None and goes_on else conditioning.copied()
        self._last = _Call(value, known, sample.detach().clone(), controls)
        if not goes_on or before is None or _compiled(controlnet):
            return
        # Another UNet may share the ControlNet. The run is this UNet's if it was called after our last call, and if the
        # images are the same tensors: a run of another UNet with the same seed and prompt may differ in nothing else.
        same = len(controls) == len(before.controls) and all(a is b for a, b in zip(controls, before.controls))
        if not (same and before.answered and patch.cache.last_timestep() == before.timestep):
            return
        schedule = patch.schedule.refresh()
        phase = patch.config.phase_at(value, schedule.num_train_timesteps)
        self.skipping = patch.cache.expects_cached(unet, value, phase, schedule)

    def _after_call(self, controlnet: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if torch.compiler.is_compiling() or self._making_whole:
            return
        if self.skipping and output is not None:
            self._skipped = _Skipped(controlnet, args, kwargs, _tensors(output))
        self.skipping = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy has runs of its own.
        return {**self.__dict__, "skipping": False, "_last": None, "_skipped": None}


class ControlNetLink:
    """What a patch knows of its pipeline's ControlNet. The pipeline owns both, and may get another one.

    Args:
        pipeline: the pipeline, or anything without an attribute `controlnet`.
    """

    def __init__(self, pipeline: Any):
        self._pipeline = WeakLink(pipeline)
        self._installed: WeakLink[nn.Module] = WeakLink(None)

    def install(self, patch: Installation) -> None:
        """Have the ControlNet that the pipeline has now skipped; one of another kind is left alone."""
        controlnet = getattr(self._pipeline(), "controlnet", None)
        if patch.cache is not None and isinstance(controlnet, nn.Module) and _nets(controlnet):
            ControlNetSkip(patch).install(controlnet, patch.cache.depth)
            self._installed = WeakLink(controlnet)

    def settle(self, patch: Installation, args: tuple, kwargs: dict, cached: bool) -> None:
        """`ControlNetSkip.settle` of what was skipped before a UNet call; arguments and errors as there."""
        for _, skip in self._found(patch):
            skip.settle(args, kwargs, cached)

    def uninstall(self, patch: Installation) -> None:
        """Undo `install`, also where the pipeline has another ControlNet by now, or is a copy."""
        for controlnet, skip in self._found(patch):
            skip.uninstall(controlnet)
        self._installed = WeakLink(None)

    def skips(self, patch: Installation) -> bool:
        """Whether the ControlNet that is in use is skipped in cached calls."""
        pipeline = self._pipeline()
        used = self._installed() if pipeline is None else getattr(pipeline, "controlnet", None)
        return any(controlnet is used and not _compiled(controlnet) for controlnet, _ in self._found(patch))

    def _found(self, patch: Installation) -> list[tuple[nn.Module, ControlNetSkip]]:
        """What stands on ControlNets for a patch: on the one it was put on, and on the pipeline's where that is a copy.

        The pipeline may be gone, as after `pipe = OtherPipeline.from_pipe(pipe)`.
        """
        found: list[tuple[nn.Module, ControlNetSkip]] = []
        places: list[Any] = [self._installed(), getattr(self._pipeline(), "controlnet", None)]
        for controlnet in places:
            skip = getattr(controlnet, "__dict__", {}).get(_ATTRIBUTE)
            known = any(skip is other for _, other in found)
            if isinstance(skip, ControlNetSkip) and skip.patch() is patch and not known:
                found.append((controlnet, skip))
        return found


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


def _as_list(control: Any) -> list[Any]:
    return list(control) if isinstance(control, (list, tuple)) else [control]


def _tensors(output: Any) -> list[Tensor]:
    down, mid = (output[0], output[1]) if isinstance(output, tuple) else output.to_tuple()
    return [*down, mid]
