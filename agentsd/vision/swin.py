"""Agent-Swin: timm's Swin transformer with agent attention over the whole map in its first blocks of each stage."""

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, to_2tuple
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

from .attention import AgentAttention
from .common import AnySizePatchEmbed, both_sides, per_stage, refuse


class AgentSwinBlock(nn.Module):
    """Block of agent attention over the whole map: no window, no shift, no mask; names as in timm's Swin block."""

    def __init__(self, dim: int, attn: AgentAttention, mlp_ratio: float, drop: float, drop_path: nn.Module, **factory):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.attn = attn
        self.drop_path = drop_path
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        _, height, width, _ = x.shape
        grid = (height, width)
        tokens = x.flatten(1, 2)
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), grid))
        tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return tokens.unflatten(1, grid)

    def set_input_size(self, feat_size: Any, window_size: Any, always_partition: bool | None = None) -> None:
        """Nothing to change: the biases are resized in the forward pass."""


class WindowBlock(SwinTransformerBlock):
    """timm's Swin block, but it pads before it rolls.

    On maps that the window does not divide, timm rolls first, so that windows mix other tokens than in training.
    """

    def _attn(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        tall, wide = self.window_size
        x = F.pad(x, (0, 0, 0, -width % wide, 0, -height % tall))
        padded_height, padded_width = x.shape[1:3]
        shifted = any(self.shift_size)
        if shifted:
            x = torch.roll(x, shifts=(-self.shift_size[0], -self.shift_size[1]), dims=(1, 2))
        mask = self.get_attn_mask(x) if self.dynamic_mask else self.attn_mask
        windows = self.attn(window_partition(x, self.window_size).flatten(1, 2), mask=mask)
        x = window_reverse(windows.unflatten(1, self.window_size), self.window_size, padded_height, padded_width)
        if shifted:
            x = torch.roll(x, shifts=self.shift_size, dims=(1, 2))
        return x[:, :height, :width].contiguous()


class AgentSwin(SwinTransformer):
    """Agent-Swin for classification and as a backbone; a timm SwinTransformer in all but its blocks.

    Args:
        agents: number of agents in training, a square number, of each stage.
        agent_blocks: how many of the first blocks of each stage use agent attention; the others are window blocks.
        agent_grid: side of the agents' grid at run time, for all stages or of each; None takes that of training.
        window_size: of the window blocks.
        dynamic_img_size: take images of any size.
        always_partition: shift the windows even where one window holds the whole map, as the authors' detection and
            segmentation backbones do.
        Others: as in timm.

    Raises:
        ValueError: a number of agents that is no square, a sequence of another length than the stages, or attention
            dropout.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        agents: int | tuple[int, ...] = (9, 16, 49, 49),
        agent_blocks: tuple[int, ...] = (2, 2, 6, 0),
        agent_grid: int | tuple[int | None, ...] | None = None,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        dynamic_img_size: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
        **settings: Any,
    ):
        refuse(settings, ("attn_drop_rate", "head_dim", "norm_layer"), "agent blocks have no such choice")
        mode = settings.pop("weight_init", "")
        stages = len(depths)
        agents = per_stage("agents", agents, stages)
        agent_grid = per_stage("agent_grid", agent_grid, stages)
        agent_blocks = per_stage("agent_blocks", agent_blocks, stages)
        factory = {"device": device, "dtype": dtype}
        least = max(to_2tuple(settings.get("patch_size", 4))) * 2 ** (stages - 1)
        super().__init__(
            img_size=img_size,
            depths=depths,
            strict_img_size=not dynamic_img_size,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            embed_layer=cast(Any, partial(AnySizePatchEmbed, least=least)),
            weight_init="skip",  # below, when the blocks have been exchanged
            **factory,
            **settings,
        )
        stage: Any  # timm's SwinTransformerStage
        for stage, count, number, side in zip(self.layers, agent_blocks, agents, agent_grid):
            blocks = list(stage.blocks)
            for i, block in enumerate(blocks):
                if i < count:
                    blocks[i] = _agent_block(block, number, side, mlp_ratio, qkv_bias, settings, factory)
                else:
                    blocks[i] = _window_block(block, mlp_ratio, qkv_bias, settings, factory)
            stage.blocks = nn.Sequential(*blocks)
        self.weight_init_mode = "reset" if mode == "skip" else mode
        if mode != "skip":
            self.init_weights(needs_reset=False)


def _agent_block(
    block: SwinTransformerBlock,
    agents: int,
    agent_grid: int | None,
    mlp_ratio: float,
    qkv_bias: bool,
    settings: dict[str, Any],
    factory: dict[str, Any],
) -> AgentSwinBlock:
    """An agent block in the place of timm's."""
    drop = settings.get("proj_drop_rate", 0.0)
    attention = AgentAttention(
        block.dim,
        block.attn.num_heads,
        agents,
        both_sides(block.input_resolution),
        qkv_bias=qkv_bias,
        proj_drop=drop,
        agent_grid=agent_grid,
        **factory,
    )
    return AgentSwinBlock(block.dim, attention, mlp_ratio, drop, _drop_path(block), **factory)


def _window_block(
    block: SwinTransformerBlock, mlp_ratio: float, qkv_bias: bool, settings: dict[str, Any], factory: dict[str, Any]
) -> WindowBlock:
    """A window block that pads before it rolls in the place of timm's."""
    drop_path = block.drop_path1
    return WindowBlock(
        dim=block.dim,
        input_resolution=block.input_resolution,
        num_heads=block.attn.num_heads,
        window_size=block.window_size,
        shift_size=block.target_shift_size,  # the shift in use may be 0, where one window holds the whole map
        always_partition=block.always_partition,
        dynamic_mask=block.dynamic_mask,
        mlp_ratio=mlp_ratio,
        qkv_bias=qkv_bias,
        proj_drop=settings.get("proj_drop_rate", 0.0),
        drop_path=drop_path.drop_prob if isinstance(drop_path, DropPath) else 0.0,
        **factory,
    )


def _drop_path(block: SwinTransformerBlock) -> nn.Module:
    return DropPath(block.drop_path1.drop_prob) if isinstance(block.drop_path1, DropPath) else nn.Identity()
