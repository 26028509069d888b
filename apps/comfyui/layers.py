"""Which self-attention layers of a ComfyUI UNet are patched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

_PARTS = ("input_blocks", "middle_block", "output_blocks")


@dataclass(frozen=True)
class Layer:
    """A transformer block whose self-attention is patched.

    Attributes:
        name: module name of the block in the UNet.
        block: the block.
        downsample: its tokens form the latent's grid divided by this.
        number: its place among the layers of the same level, in the order of a call; draws depend on it.
    """

    name: str
    block: nn.Module
    downsample: int
    number: int


def is_unet(model: nn.Module) -> bool:
    """Whether this is ComfyUI's UNet of SD 1.x, SD 2.x, SDXL and their relatives, and not a DiT or another model."""
    return all(hasattr(model, part) for part in _PARTS)


def find_layers(unet: nn.Module, max_downsample: int | str) -> tuple[list[Layer], dict[str, str]]:
    """Find the transformer blocks whose self-attention is patched.

    Args:
        unet: a model that `is_unet` accepts.
        max_downsample: as in AgentConfig; "auto" is the level of highest resolution that has self-attention.

    Returns:
        The layers in the order of a call (input, middle, output blocks), and for each other block the reason.
    """
    skipped: dict[str, str] = {}
    candidates: list[tuple[str, nn.Module, int]] = []
    downsample = 1
    for stage, modules in _stages(unet):
        for place, module in modules.named_children():
            kind = type(module).__name__
            # A Downsample ends its level and an Upsample, the last of its stage, begins the next one.
            if kind == "Downsample":
                downsample *= 2
            elif kind == "Upsample":
                downsample //= 2
            for index, block in enumerate(getattr(module, "transformer_blocks", ())):
                name = f"{stage}.{place}.transformer_blocks.{index}"
                reason = _why_not(module, block)
                if reason is None:
                    candidates.append((name, block, downsample))
                else:
                    skipped[name] = reason
    limit = max_downsample
    if limit == "auto":
        limit = min((level for _, _, level in candidates), default=1)
    layers: list[Layer] = []
    for name, block, level in candidates:
        if level > int(limit):
            skipped[name] = f"its level is downsampled {level}×, max_downsample is {limit}"
        else:
            layers.append(Layer(name, block, level, sum(layer.downsample == level for layer in layers)))
    return layers, skipped


def _stages(unet: Any) -> list[tuple[str, nn.Module]]:
    stages = [(f"input_blocks.{index}", stage) for index, stage in enumerate(unet.input_blocks)]
    if unet.middle_block is not None:
        stages.append(("middle_block", unet.middle_block))
    return stages + [(f"output_blocks.{index}", stage) for index, stage in enumerate(unet.output_blocks)]


def _why_not(transformer: nn.Module, block: nn.Module) -> str | None:
    """The reason why a block of this kind is not patched, or None."""
    if hasattr(transformer, "time_stack"):
        return "it belongs to a video model"
    if getattr(block, "disable_self_attn", False):
        return "it attends to the text only"
    return None
