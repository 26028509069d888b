"""Agent-CSwin: the CSWin transformer with agent attention in its first two stages and cross-shaped windows after them.

Sources: Han et al., "Agent Attention", ECCV 2024 (arXiv 2312.08874); Dong et al., "CSWin Transformer", CVPR 2022 (arXiv
2107.00652).
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import register_notrace_module
from torch import Tensor, nn

from .attention import AgentCore, depthwise_conv, from_image, grid_of, to_image
from .common import both_sides, per_stage, refuse
from .stages import Blocks, Pyramid, drop_path_rates, initialize, make_head


class AgentBranch(AgentCore):
    """Agent attention over the whole map; the projections belong to the block.

    Its depthwise convolution has CSWin's name for the local position encoding.
    """

    def __init__(
        self, dim: int, num_heads: int, num_agents: int, grid: tuple[int, int], device=None, dtype=None, **bias
    ):
        super().__init__(dim, num_heads, num_agents, grid, device=device, dtype=dtype, **bias)
        self.get_v = depthwise_conv(dim, device, dtype)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, N, C] each -> [B, N, C]."""
        local = self.with_class_token(self.get_v(self.without_class_token(value, grid)))
        return self.attend(query, key, value, grid) + local


@register_notrace_module  # reason: sizes decide how many stripes there are
class StripeBranch(nn.Module):
    """Softmax attention inside stripes of the map, plus a local position encoding that ends at a stripe's edge.

    Where the width of a stripe does not divide the side, the last stripe is narrower.

    Args:
        dim: channels of this branch.
        num_heads: heads of this branch.
        split: width of a stripe; 0 for one stripe over the whole map.
        vertical: stripes as high as the map; else as wide as the map.
    """

    def __init__(self, dim: int, num_heads: int, split: int, vertical: bool = True, device=None, dtype=None):
        super().__init__()
        self.num_heads = num_heads
        self.split = split
        self.vertical = vertical
        self.get_v = depthwise_conv(dim, device, dtype)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, N, C] each -> [B, N, C]."""
        maps = [tokens.unflatten(1, grid) for tokens in [query, key, value]]
        side = 2 if self.vertical else 1
        length = maps[0].shape[side]
        if self.split == 0 or self.split >= length:
            return self._attend(maps, length).flatten(1, 2)
        whole = length - length % self.split
        out = self._attend([part.narrow(side, 0, whole) for part in maps], self.split)
        if whole < length:
            rest = length - whole
            last = self._attend([part.narrow(side, whole, rest) for part in maps], rest)
            out = torch.cat([out, last], dim=side)
        return out.flatten(1, 2)

    def _attend(self, maps: list[Tensor], width: int) -> Tensor:
        """Attention in stripes of `width`, which divides the side: [B, H, W, C] each -> [B, H, W, C]."""
        batch, height, along, _ = maps[0].shape
        stripe = (height, width) if self.vertical else (width, along)
        query, key, value = _cut(maps[0], stripe), _cut(maps[1], stripe), _cut(maps[2], stripe)
        local = from_image(self.get_v(to_image(value, stripe)))
        out = F.scaled_dot_product_attention(self._split(query), self._split(key), self._split(value))
        out = out.transpose(1, 2).flatten(2) + local
        return _join(out, batch, (height, along), stripe)

    def _split(self, tokens: Tensor) -> Tensor:
        """[B', N, C] -> [B', heads, N, head_dim]."""
        return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def _cut(maps: Tensor, stripe: tuple[int, int]) -> Tensor:
    """[B, H, W, C] -> [B · stripes, tokens of a stripe, C]."""
    pieces = maps.unflatten(1, (-1, stripe[0])).unflatten(3, (-1, stripe[1]))  # B i h j w C
    return pieces.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _join(tokens: Tensor, batch: int, grid: tuple[int, int], stripe: tuple[int, int]) -> Tensor:
    """The inverse of _cut: [B · stripes, tokens of a stripe, C] -> [B, H, W, C]."""
    pieces = tokens.unflatten(0, (batch, grid[0] // stripe[0], grid[1] // stripe[1])).unflatten(
        3, stripe
    )  # B i j h w C
    return pieces.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class CswinBlock(nn.Module):
    """Pre-norm block whose projections are shared by one branch, or by two on half of the channels each."""

    def __init__(self, dim: int, branches: list[nn.Module], mlp_ratio: float, drop: float, drop_path: float, **factory):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.qkv = nn.Linear(dim, 3 * dim, **factory)
        self.attns = nn.ModuleList(branches)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, **factory)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, N, C] -> [B, N, C]; grid is the (height, width) of the tokens."""
        query, key, value = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        # Each branch has its part of the channels.
        count = len(self.attns)
        queries, keys, values = query.chunk(count, dim=-1), key.chunk(count, dim=-1), value.chunk(count, dim=-1)
        parts = []
        for i, branch in enumerate(self.attns):
            parts.append(branch(queries[i], keys[i], values[i], grid))
        out = torch.cat(parts, dim=-1)
        x = x + self.drop_path(self.proj_drop(self.proj(out)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ToTokens(nn.Module):
    """[B, C, h, w] -> [B, h·w, C]."""

    def forward(self, image: Tensor) -> Tensor:
        return from_image(image)


class Merge(nn.Module):
    """Between two stages: a 3 × 3 convolution of stride 2, then a norm."""

    def __init__(self, dim: int, out_dim: int, **factory):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, **factory)
        self.norm = nn.LayerNorm(out_dim, **factory)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[B, C, h, w] -> tokens [B, N, out_dim] and their grid."""
        image = self.conv(image)
        return self.norm(from_image(image)), grid_of(image)


class AgentCswin(Pyramid):
    """Agent-CSwin for classification, and as a backbone with maps at strides 4, 8, 16 and 32.

    Args:
        embed_dim: channels of the first stage, doubled in each further one.
        depths, num_heads: of each stage.
        agents: number of agents in training, a square number, of each stage; None for softmax attention: in stripes,
            or over the whole map in the last stage.
        split: width of the stripes.
        agent_grid: side of the agents' grid at run time, for all stages or of each; None takes that of training.
        Others: as in Pyramid.

    Raises:
        ValueError: a number of agents that is no square, a sequence that has not one value per stage, or attention
            dropout.
    """

    if TYPE_CHECKING:  # set by name below; TorchScript reads annotations and does not know these
        stage1: Blocks
        stage2: Blocks
        stage3: Blocks
        stage4: Blocks
        merge1: Merge
        merge2: Merge
        merge3: Merge

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: tuple[int, ...] = (2, 4, 18, 1),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        agents: tuple[int | None, ...] = (9, 16, None, None),
        split: int = 7,
        agent_grid: int | tuple[int | None, ...] | None = None,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device=None,
        dtype=None,
    ):
        refuse({"attn_drop_rate": attn_drop_rate}, ("attn_drop_rate",), "agent attention has no such thing")
        factory = {"device": device, "dtype": dtype}
        dims = tuple(embed_dim * 2**i for i in range(self.num_stages))
        super().__init__(both_sides(img_size), dynamic_img_size, in_chans, num_classes, global_pool, dims, drop_rate)
        agents = per_stage("agents", agents, self.num_stages)
        agent_grid = per_stage("agent_grid", agent_grid, self.num_stages)
        rates = drop_path_rates(drop_path_rate, depths)
        self.stage1_conv_embed = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim, 7, stride=4, padding=2, **factory),
            ToTokens(),
            nn.LayerNorm(embed_dim, **factory),
        )
        height, width = ((side - 3) // 4 + 1 for side in self.img_size)
        for i, dim in enumerate(dims):
            if i:
                setattr(self, f"merge{i}", Merge(dims[i - 1], dim, **factory))
                height, width = (height - 1) // 2 + 1, (width - 1) // 2 + 1
            blocks = Blocks()
            for rate in rates[i]:
                branches: list[nn.Module]
                if (count := agents[i]) is not None:
                    grid = (height, width)
                    branches = [AgentBranch(dim, num_heads[i], count, grid, agent_grid=agent_grid[i], **factory)]
                elif i == self.num_stages - 1:
                    branches = [StripeBranch(dim, num_heads[i], 0, **factory)]
                else:
                    half = (dim // 2, num_heads[i] // 2, split)
                    branches = [StripeBranch(*half, vertical, **factory) for vertical in (True, False)]
                blocks.append(CswinBlock(dim, branches, mlp_ratio, proj_drop_rate, rate, **factory))
            setattr(self, f"stage{i + 1}", blocks)
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stage{i + 1}"})
        self.norm: nn.Module = nn.LayerNorm(dims[-1], **factory)
        self.head = make_head(dims[-1], num_classes, **factory)
        self.apply(initialize)

    def run_stage(self, stage: int, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        grid = (0, 0)
        if stage == 0:
            x = self.stage1_conv_embed[0](x)
            grid = grid_of(x)
            x = self.stage1(self.stage1_conv_embed[2](self.stage1_conv_embed[1](x)), grid)
        if hasattr(self, "stage2"):
            if stage == 1:
                x, grid = self.merge1(x)
                x = self.stage2(x, grid)
        if hasattr(self, "stage3"):
            if stage == 2:
                x, grid = self.merge2(x)
                x = self.stage3(x, grid)
        if hasattr(self, "stage4"):
            if stage == 3:
                x, grid = self.merge3(x)
                x = self.stage4(x, grid)
        return x, grid

    def blocks_of(self, stage: int) -> Blocks:
        return getattr(self, f"stage{stage + 1}")

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def remove_norm(self) -> None:
        self.norm = nn.Identity()

    def remove_stage(self, stage: int) -> None:
        delattr(self, f"stage{stage + 1}")
        delattr(self, f"merge{stage}")

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone: none by name."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that group the parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^stage1_conv_embed",
            "blocks": r"^(?:stage|merge)(\d)"
            if coarse
            else [(r"^stage(\d)\.(\d+)", None), (r"^merge(\d)", (99999,)), (r"^norm", (99999,))],
        }

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the image size; the biases are resized in the forward pass."""
        self.img_size = both_sides(img_size)
