"""The 18 registered models with all their kinds of attention and agents, but few channels, few blocks, small images."""

from __future__ import annotations

from typing import Any

import timm
import torch

from agentsd.vision import VARIANTS, AgentCswin, AgentDeit, AgentPvt

NAMES = sorted(VARIANTS)

MOST = 2
"""Blocks of a kind in a stage, at most: with 2, Swin has windows with and without shift."""


def settings(name: str, side: int = 64) -> dict[str, Any]:
    """Arguments of timm.create_model that make a model small: 4 channels a head, its own number of heads."""
    variant = VARIANTS[name]
    own = variant.settings
    if variant.family is AgentDeit:
        agents = min(own.get("agent_blocks", 12), MOST)
        depth = agents + min(12 - own.get("agent_blocks", 12), MOST)
        dim = 4 * own["num_heads"]
        return dict(img_size=side, embed_dim=dim, mlp_ratio=1.0, depth=depth, agent_blocks=agents)
    depths = tuple(min(depth, MOST) for depth in own["depths"])
    if variant.family is AgentPvt:
        return dict(img_size=side, dims=tuple(4 * heads for heads in (1, 2, 5, 8)), mlp_ratios=(1,) * 4, depths=depths)
    small = dict(img_size=side, embed_dim=4 * own["num_heads"][0], mlp_ratio=1.0)
    if variant.family is AgentCswin:
        return dict(small, depths=depths)
    agents = tuple(min(count, MOST) for count in own["agent_blocks"])
    windows = (min(depth - count, MOST) for depth, count in zip(own["depths"], own["agent_blocks"]))
    return dict(small, agent_blocks=agents, depths=tuple(map(sum, zip(agents, windows))))


def small(name: str, side: int = 64, **changed: Any) -> torch.nn.Module:
    """A small model in eval mode, with biases large enough to matter."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**settings(name, side), **changed}).eval()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if label.endswith(("_bias", "_bias_table")) or "pos_embed" in label:
                parameter.normal_(std=0.5)
    return model


def images(side: int = 64, batch: int = 1) -> torch.Tensor:
    """[batch, 3, side, side]."""
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
