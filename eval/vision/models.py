"""Build any model of the benchmark by name and image size: ours, timm's, and the first PVT, which timm lacks."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

import agentsd.vision  # noqa: F401  registers the agent transformers
from agentsd.attention import softmax_attention
from agentsd.vision import AgentPvt
from agentsd.vision.attention import from_image, to_image
from agentsd.vision.stages import TransformerBlock
from eval.common.protocol import BenchError

PVT_DEPTHS = {
    "pvt_v1_tiny": (2, 2, 2, 2),
    "pvt_v1_small": (3, 4, 6, 3),
    "pvt_v1_medium": (3, 4, 18, 3),
    "pvt_v1_large": (3, 8, 27, 3),
}
_REDUCTION = (8, 4, 2, 1)


class ReducedAttention(nn.Module):
    """Softmax attention whose keys and values come from a map reduced by a strided convolution (PVT, equation 2)."""

    def __init__(self, dim: int, num_heads: int, reduction: int, **factory):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, **factory)
        self.kv = nn.Linear(dim, 2 * dim, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.sr = nn.Conv2d(dim, dim, reduction, stride=reduction, **factory) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim, **factory) if reduction > 1 else None

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        read = x
        if self.sr is not None and self.norm is not None:
            read = self.norm(from_image(self.sr(to_image(x, grid))))
        key, value = self.kv(read).chunk(2, dim=-1)
        split = lambda t: t.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # noqa: E731
        out = softmax_attention(split(self.q(x)), split(key), split(value))
        return self.proj(out.transpose(1, 2).flatten(2))


def pvt_v1(depths: tuple[int, ...], size: int) -> nn.Module:
    """The first PVT on our pyramid: the same body with its own attention, and an average where it has a class token.

    The class token is one of 50 tokens of the last stage, so the cost is the original's within 1 %.
    """
    model = AgentPvt(img_size=size, depths=depths)
    for i in range(4):
        blocks = model.blocks_of(i)
        for number in range(len(blocks)):
            block: Any = blocks[number]
            heads, dim = block.attn.num_heads, block.norm1.normalized_shape[0]
            attention = ReducedAttention(dim, heads, _REDUCTION[i])
            ratio = block.mlp.fc1.out_features / dim
            blocks[number] = TransformerBlock(dim, attention, ratio, 1e-6, DropPath(0.0))
    return model


def build(name: str, size: int, device: torch.device | str = "meta", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in eval mode for images of size × size pixels, with random weights.

    Raises:
        BenchError: the size is not a multiple of the model's patches.
    """
    if size % 32 and "deit" not in name or size % 16:
        raise BenchError(f"{size} pixels: must be a multiple of {16 if 'deit' in name else 32} for {name}")
    with torch.device(device):
        model = pvt_v1(PVT_DEPTHS[name], size) if name in PVT_DEPTHS else timm.create_model(name, img_size=size)
    return model.to(dtype).eval().requires_grad_(False)


def published_size(name: str) -> int:
    """Side of the images that a model was trained with, in pixels."""
    if name in PVT_DEPTHS:
        return 224
    published = timm.get_pretrained_cfg(name)
    if published is None:
        raise BenchError(f"{name}: timm knows no size that it was trained with")
    return published.input_size[-1]
