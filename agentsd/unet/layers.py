"""Which self-attention layers of a diffusers UNet can be patched, and what else is read off a model's structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import nn

from ..config import AgentConfig
from .processor import AgentAttnProcessor

UNet: TypeAlias = UNet2DConditionModel | UNetMotionModel

# AnimateDiff's UNet is the first with motion modules between its blocks: its spatial layers are the same.
UNET_CLASSES = (UNet2DConditionModel, UNetMotionModel)


@dataclass(eq=False)
class PatchedLayer:
    """A self-attention layer that the settings reach.

    Attributes:
        name: module name of the attention in the UNet.
        block: the transformer block that it is `attn1` of.
        downsample: its tokens form the latent's grid divided by this.
        attn: the attention.
    """

    name: str
    block: BasicTransformerBlock
    downsample: int
    attn: Attention


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that is left alone.

    Attributes:
        name: module name in the UNet.
        reason: why.
        foreign: because of its processor, which somebody else has put there.
    """

    name: str
    reason: str
    foreign: bool = False


RESET_ATTN1 = (
    "put diffusers' own on the self-attention alone (`for name, module in unet.named_modules(): if name.endswith("
    "'attn1'): module.set_processor(AttnProcessor2_0())`) and call agentsd.apply_patch again"
)
"""The remedy for self-attention with another processor; unet.set_attn_processor would take IP-Adapter's off too."""

# Processors that compute plain softmax attention with the layer's own projections: what ours may stand in for.
_SOFTMAX_PROCESSORS = (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)

# Where the hooks of diffusers' guiders are defined.
_GUIDERS = ("diffusers.hooks.layer_skip", "diffusers.hooks.smoothed_energy_guidance_utils")

_OWN_SIZE = 64  # latent pixels of Stable Diffusion 1.x, for a UNet whose configuration names none


def is_plain_softmax(processor: Any) -> bool:
    """Whether a processor is one of diffusers' that compute plain softmax attention; a subclass is not."""
    return type(processor) in _SOFTMAX_PROCESSORS


def class_name(thing: Any) -> str:
    """Name of an object's class, with its module unless it is diffusers' own.

    Two libraries may each have an AttnProcessor2_0.
    """
    module, name = type(thing).__module__, type(thing).__qualname__
    return name if module.startswith("diffusers.") else f"{module}.{name}"


def replaced_forward(module: nn.Module) -> str | None:
    """Name what somebody put in place of a module's forward, or None.

    Offloading by accelerate and diffusers' own hooks wrap it too, and call the original.
    """
    forward = vars(module).get("forward")
    if forward is None or hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook"):
        return None
    name = f"{getattr(forward, '__module__', '?')}.{getattr(forward, '__qualname__', type(forward).__name__)}"
    return f"the forward {name}"


def is_guided(attn: Attention) -> bool:
    """Whether a guider of diffusers (SLG, PAG, SEG) works on a layer in this call, by a hook on it or its queries."""
    for module in (attn, attn.to_q):
        registry = vars(module).get("_diffusers_hook")
        if registry is not None and any(type(hook).__module__ in _GUIDERS for hook in registry.hooks.values()):
            return True
    return False


def register_processor() -> None:
    """Tell diffusers how its guiders skip a layer with our processor: as one with its own."""
    # Not by `register`, which imports the processors of every transformer that diffusers has.
    metadata = AttentionProcessorMetadata(skip_processor_output_fn=_skipped_attention)
    AttentionProcessorRegistry._registry.setdefault(AgentAttnProcessor, metadata)


def _skipped_attention(attn: Attention, *args: Any, **kwargs: Any) -> Any:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def find_other_cache(unet: nn.Module) -> str | None:
    """Name another tool that skips or reuses parts of a UNet (DeepCache, T-GATE, a hook of diffusers), or None."""
    for module in unet.modules():
        for name in (getattr(vars(module).get("forward"), "__module__", None), type(module).forward.__module__):
            for tool, what in (("DeepCache", "DeepCache"), ("tgate", "T-GATE")):
                if name is not None and name.split(".")[0] == tool:
                    return what
        registry = getattr(module, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", {}):
            if "cache" in hook or "attention_broadcast" in hook or "skip" in hook:
                return f"diffusers' hook {hook}"
    return None


def stores_attention(unet: nn.Module) -> bool:
    """Whether the middle block's attention is stored for somebody who reads it after each call, as SAG does."""
    attentions = getattr(unet.mid_block, "attentions", None) or []
    processors = (module.processor for part in attentions for module in part.modules() if isinstance(module, Attention))
    return any("Store" in type(processor).__name__ for processor in processors)


def own_latent_size(unet: UNet) -> tuple[int, int]:
    """(height, width) of the latents that a UNet was made for, in latent pixels; 64 × 64 where it does not say."""
    size = unet.config.sample_size
    if isinstance(size, (tuple, list)):
        return int(size[0]), int(size[1])
    return (int(size),) * 2 if size else (_OWN_SIZE,) * 2


def unwrap_unet(model: Any) -> tuple[UNet, nn.Module]:
    """Find the UNet in a pipeline, a UNet, or what wraps one.

    torch.compile, DataParallel, DistributedDataParallel, FullyShardedDataParallel and peft's models are unwrapped.

    Returns:
        The UNet, and the outermost module, which is the one that callers call.

    Raises:
        TypeError: there is none.
    """
    outer: Any = model if isinstance(model, nn.Module) else getattr(model, "unet", None)
    inner = outer
    while inner is not None:
        if isinstance(inner, UNET_CLASSES):
            return inner, outer
        innermost, inner = inner, _unwrapped(inner)
    what = type(model).__name__
    if outer is not None and innermost is not model:
        what += f" with a {type(innermost).__name__}"
    elif hasattr(model, "transformer"):
        what += f" with a {type(model.transformer).__name__} (a transformer, not a UNet)"
    raise TypeError(
        f"cannot patch a {what}: agentsd patches a UNet2DConditionModel, a UNetMotionModel or a diffusers pipeline "
        "that has one as its `unet`, such as Stable Diffusion 1.x, 2.x, SDXL and AnimateDiff"
    )


def _unwrapped(module: Any) -> nn.Module | None:
    """The module inside a wrapper, or None."""
    if not isinstance(module, nn.Module):
        return None
    for name in ("_orig_mod", "module"):  # of torch.compile; of DataParallel, DDP, FSDP
        if isinstance(inner := getattr(module, name, None), nn.Module):
            return inner
    inner = getattr(module, "get_base_model", lambda: None)()  # peft
    return inner if isinstance(inner, nn.Module) and inner is not module else None


def find_layers(unet: UNet, config: AgentConfig) -> tuple[list[PatchedLayer], list[SkippedLayer]]:
    """Find the self-attention layers that the settings reach, in the order of the UNet's modules, and the others."""
    candidates: list[PatchedLayer] = []
    skipped: list[SkippedLayer] = []
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    of_blocks = {part for block in blocks for part in block.modules()}
    for prefix, stage, downsample in _stages(unet):
        for name, module in stage.named_modules(prefix=prefix):
            if isinstance(module, BasicTransformerBlock):
                layer = PatchedLayer(f"{name}.attn1", module, downsample, module.attn1)
                if (reason := _why_not(layer)) is None:
                    candidates.append(layer)
                else:
                    skipped.append(SkippedLayer(layer.name, reason))
            elif isinstance(module, Attention) and module not in of_blocks:
                skipped.append(SkippedLayer(name, "it is not part of a BasicTransformerBlock"))

    # The levels follow from the model alone, whatever processors it has.
    limit = config.max_downsample
    if isinstance(limit, str):  # "auto"
        limit = min((layer.downsample for layer in candidates), default=1)
    eligible = []
    for layer in candidates:
        processor = layer.attn.processor
        if layer.downsample > limit:
            reason = f"its level is downsampled {layer.downsample}×, max_downsample is {limit}"
            skipped.append(SkippedLayer(layer.name, reason))
        elif is_plain_softmax(processor) or is_ours(layer):
            eligible.append(layer)
        else:
            reason = f"its processor {class_name(processor)} is not one of diffusers' plain softmax processors"
            skipped.append(SkippedLayer(layer.name, reason, foreign=True))
    return eligible, skipped


def why_none(skipped: list[SkippedLayer]) -> str:
    """Say why no layer is eligible, from what `find_layers` skipped."""
    return "; ".join(sorted({layer.reason for layer in skipped})) or "it has no self-attention"


def is_ours(layer: PatchedLayer) -> bool:
    """Whether a patch's processor is on the layer."""
    return isinstance(layer.attn.processor, AgentAttnProcessor)


def _stages(unet: UNet) -> Iterator[tuple[str, nn.Module, int]]:
    """The UNet's down, middle and up blocks as (name, module, downsampling of the latent inside it)."""
    downsample = 1
    for index, block in enumerate(unet.down_blocks):
        yield f"down_blocks.{index}", block, downsample
        downsample *= 2 if getattr(block, "downsamplers", None) else 1
    if unet.mid_block is not None:
        yield "mid_block", unet.mid_block, downsample
    for index, block in enumerate(unet.up_blocks):
        yield f"up_blocks.{index}", block, downsample
        downsample //= 2 if getattr(block, "upsamplers", None) else 1


def _why_not(layer: PatchedLayer) -> str | None:
    """The reason why a layer of this kind cannot be patched, or None."""
    block, attn = layer.block, layer.attn
    if ".motion_modules." in layer.name:
        return "it attends over time, in a motion module"
    if block.only_cross_attention:
        return "it attends to the text only"
    if block.pos_embed is not None:
        return "its block adds positional embeddings before attention"
    if attn.group_norm is not None or attn.spatial_norm is not None or attn.residual_connection:
        return "it has a norm or a residual of its own"
    return None
