"""What one apply_patch puts on one UNet: processors and hooks, installed and uninstalled as a whole."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from ..config import AgentConfig, Phase
from .call import BlockHook, LastCall, UNetHook, is_ours
from .checkpointing import unwatch_checkpoints
from .claim import Claim
from .compiled import EagerEntry, EagerExit, unwatch_compilation, watch_compilation
from .controlnet import ControlNetLink
from .layers import UNet
from .merge_around import MergeAround
from .processor import LAYER_ATTRIBUTE, AgentAttnProcessor, CallInProgress, LayerState
from .schedule import Schedule
from .step_cache import StepCache
from .weak_link import WeakLink

PATCH_ATTRIBUTE = "_agentsd_patch"


@dataclasses.dataclass
class PatchedLayer:
    """One self-attention layer, its block, and the processor to put back."""

    attn: Attention
    block: BasicTransformerBlock
    original: Any
    state: LayerState


class Installation:
    """One patch of one UNet.

    Attributes:
        config: the settings.
        schedule: length of the diffusion run, from the pipeline's scheduler.
        layers: the patched self-attention layers, in the order of the UNet's modules.
        skipped: (layer name, reason) of every self-attention layer that was left alone.
        call: the UNet call in progress, shared with the layers.
        cache: the step cache, None with cache_interval=1.
        controlnet: the pipeline's, which cached calls skip.
        claim: which thread is inside the UNet.
        prepared: a caller outside a compiled graph has prepared the call, so that the graph need not.
        compiled: calls run in a graph of the whole UNet.
        cached: the call in progress, or the last one, skips what a kept feature stands for.
        phase, timestep: of the call in progress or the last one; the least noisy sample's. None before the first call.
        last_call: what happened in the last call, None before the first.
        first_size: (height, width) of the latent in the first compiled call.
        completed_once: a call has returned since the patch.
        replaced_by: the processors found in place of ours in the last call, which a warning has named.

    Args:
        unet: the UNet; the reference is weak, as the patch hangs on it.
        outer: the module that callers call, another one where torch.compile wraps the UNet.
        eligible, skipped: from `find_layers`.
        pipeline: the pipeline, or the UNet where there is none.
    """

    def __init__(
        self,
        unet: UNet,
        outer: nn.Module,
        config: AgentConfig,
        schedule: Schedule,
        eligible: list[tuple[str, BasicTransformerBlock, int]],
        skipped: list[tuple[str, str]],
        pipeline: Any,
    ):
        self.config = config
        self.schedule = schedule
        self.skipped = skipped
        self.call = CallInProgress()
        self.claim = Claim(unet)
        self.prepared = False
        self.compiled = False
        self.cached = False
        self.phase: Phase = Phase.MERGE
        self.timestep: float | None = None
        self.last_call: LastCall | None = None
        self.completed_once = False
        self.first_size: tuple[int, int] | None = None
        self.replaced_by = ""
        self._warned: set[str] = set()
        self.cache = StepCache(config) if config.cache_interval > 1 else None
        self.controlnet = ControlNetLink(pipeline)
        self._unet = WeakLink(unet, pickled=True)
        self._outer = WeakLink(outer, pickled=True)
        self._handles: list[Any] = []
        keeps_matching = config.merge_crossattn or config.merge_mlp
        self.layers = [
            PatchedLayer(
                block.attn1,
                block,
                None,
                LayerState(name, downsample, config, self.call, block.attn1.processor, keeps_matching),
            )
            for name, block, downsample in eligible
        ]

    @property
    def unet(self) -> UNet:
        """The UNet that the patch was made for. Raises RuntimeError once it is gone."""
        return self._unet.target()

    @property
    def num_train_timesteps(self) -> int:
        """Length of the diffusion run by the scheduler that the pipeline has now."""
        return self.schedule.refresh().num_train_timesteps

    def warn_once(self, kind: str, message: str) -> None:
        """Warn, if there was no warning of this kind yet."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=2)

    def mark_warned(self, kind: str) -> None:
        """Count a kind of warning as given."""
        self._warned.add(kind)

    def install(self) -> None:
        """Put the processors and hooks on the UNet."""
        unet, outer = self.unet, self._outer()
        processor = AgentAttnProcessor()  # it has no state, so one serves all layers
        for layer in self.layers:
            attn, block, state = layer.attn, layer.block, layer.state
            layer.original = attn.processor
            if isinstance(layer.original, AgentAttnProcessor):
                # Not a patch: someone put back what they had saved while there was one (unfuse_qkv_projections, PAG).
                layer.original = AttnProcessor2_0()
            state.fallback = layer.original
            setattr(attn, LAYER_ATTRIBUTE, state)
            attn.set_processor(processor)
            self._handles.append(block.register_forward_pre_hook(BlockHook(state), with_kwargs=True))
            if self.config.merge_crossattn and block.attn2 is not None:
                self._handles += MergeAround(block, state).install(block.attn2)
            if self.config.merge_mlp:
                self._handles += MergeAround(block, state).install(block.ff)

        hook = UNetHook(self)
        self._handles.append(unet.register_forward_pre_hook(hook, with_kwargs=True))
        self._handles.append(unet.register_forward_hook(hook.after_call, always_call=True))
        if outer is not None and getattr(outer, "_orig_mod", None) is unet:
            self._handles.append(outer.register_forward_pre_hook(EagerEntry(hook), with_kwargs=True))
            self._handles.append(outer.register_forward_hook(EagerExit(hook), always_call=True))
        if getattr(unet, "conv_out", None) is not None:
            self._handles.append(unet.conv_out.register_state_dict_pre_hook(_warn_where_rebuilt))
        if self.cache is not None:
            self.cache.install(unet)
            self.controlnet.install(self)
        setattr(unet, PATCH_ATTRIBUTE, self)
        watch_compilation(unet, hook)

    def uninstall(self) -> None:
        """Restore the original processors and remove every hook. A processor that someone set after the patch stays."""
        unet = self.unet
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        unwatch_checkpoints(unet)
        if self.cache is not None:
            self.cache.uninstall(unet)
            self.controlnet.uninstall(self)
        for layer in self.layers:
            if is_ours(layer):
                layer.attn.set_processor(layer.original)
            delattr(layer.attn, LAYER_ATTRIBUTE)
        delattr(unet, PATCH_ATTRIBUTE)
        unwatch_compilation(unet)

    def end_call(self) -> None:
        """Forget the call in progress and let go of the UNet."""
        self.call.active = False
        for layer in self.layers:
            layer.state.clear()
        self.claim.leave()

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """Have this patch on the UNet for a `with` block; for a backward pass after it was removed or replaced."""
        unet = self.unet
        current: Installation | None = getattr(unet, PATCH_ATTRIBUTE, None)
        if current is self:
            yield
            return
        if current is not None:
            current.uninstall()
        self.install()
        try:
            yield
        finally:
            self.uninstall()
            if current is not None:
                current.install()


def _warn_where_rebuilt(conv_out: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Hook on the copying of weights: UNetMotionModel.from_unet2d takes a UNet's parts without the patch."""
    if prefix == "" and sys._getframe(2).f_code.co_name == "from_unet2d":
        warnings.warn(
            "agentsd: the UNet that is built here from a patched one is not patched. Call agentsd.apply_patch on the "
            "new pipeline too",
            stacklevel=3,
        )
