"""Start a UNet from the weights of one that has a resolution level less."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def old_name(key: str, old_levels: int) -> str | None:
    """The name that a weight of the larger UNet has in the smaller one; None for one of the new top level.

    Down block i of the smaller becomes i + 1, up block i stays i: both count from where their data comes from.
    """
    part, _, rest = key.partition(".")
    if part not in ("down_blocks", "up_blocks"):
        return key
    number, _, rest = rest.partition(".")
    level = int(number) - 1 if part == "down_blocks" else int(number)
    return f"{part}.{level}.{rest}" if 0 <= level < old_levels else None


@torch.no_grad()
def grow(unet: UNet2DConditionModel, small: dict[str, Tensor], old_levels: int) -> set[str]:
    """Fill `unet` from the weights of a UNet2DConditionModel with one level less; returns the keys left fresh.

    Every weight whose name and shape agree is copied. The rest is set so that the network starts as the smaller one
    applied to the 2 × 2 means of conv_in's features, its output enlarged: the new level's residual branches end in
    zeros, its downsampler takes means, its upsampler repeats. An attn1 that attends to the text
    starts with output zero.

    Args:
        unet: a UNet2DConditionModel with layers_per_block as in `small`.
        small: that model's state dict.
        old_levels: how many levels it has.

    Raises:
        ValueError: `unet` has not one level more.
    """
    if len(unet.down_blocks) != old_levels + 1:
        raise ValueError(f"a UNet of {old_levels} levels grows to {old_levels + 1}, not {len(unet.down_blocks)}")
    state = unet.state_dict()
    fresh = set()
    for key, value in state.items():
        source = small.get(old_name(key, old_levels) or "")
        if source is not None and source.shape == value.shape:
            value.copy_(source)
        else:
            fresh.add(key)

    for name, module in unet.named_modules():
        if name.endswith("attn1") and module.is_cross_attention:
            silence(module.to_out[0])
    top_down, top_up = unet.down_blocks[0], unet.up_blocks[-1]
    for resnet in (*top_down.resnets, *top_up.resnets):
        silence(resnet.conv2)
    for transformer in (*top_down.attentions, *top_up.attentions):
        silence(transformer.proj_out)
    for resnet in top_up.resnets:
        pass_first_channels(resnet.conv_shortcut)
    mean_downsampler(top_down.downsamplers[0].conv)
    nn.init.dirac_(unet.up_blocks[old_levels - 1].upsamplers[0].conv.weight)
    nn.init.zeros_(unet.up_blocks[old_levels - 1].upsamplers[0].conv.bias)
    return fresh


def silence(layer: nn.Conv2d | nn.Linear) -> None:
    """Make a layer give zeros until it has learned something."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def pass_first_channels(conv: nn.Conv2d) -> None:
    """Make a 1 × 1 convolution pass its first channels on: an up block's skip connection comes after them."""
    silence(conv)
    nn.init.dirac_(conv.weight)


def mean_downsampler(conv: nn.Conv2d) -> None:
    """Make a 3 × 3 convolution of stride 2 and padding 1 the mean of each 2 × 2 cell."""
    silence(conv)
    for channel in range(conv.out_channels):
        conv.weight[channel, channel, 1:, 1:] = 0.25
