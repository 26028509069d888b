"""What one layer does in one call: settings, phase and grid give stride, tile, counts and splits; torch only.

The same plan serves UNets of diffusers, ComfyUI, `describe` and `visualize`, so that none of them counts for itself.

    plan = plan_layer(config, Phase.AGENT, grid=(64, 64))      # plain numbers, computed once per settings and grid
    splits = draw_splits(plan, config, timestep, num_layers)   # the dsts and srcs of this call, one split a layer
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from .config import AgentConfig, Phase
from .merging import GridSplit, TokenMatching, grid_cells, match_tokens, split_grid, tile_size

Action = Literal["agents", "merge", "downsample", "none"]


@dataclass(frozen=True)
class LayerPlan:
    """What a self-attention layer on one grid does in one phase, as plain numbers.

    Attributes:
        action: "agents" is agent attention on merged tokens, "merge" softmax attention on merged tokens, "downsample"
            softmax attention to one token of each cell, "none" the model's own attention.
        reason: why the action is "none"; empty otherwise.
        grid: (height, width) in tokens.
        stride: (rows, columns) of one cell.
        tile: (rows, columns) of the tiles that tokens are matched in, None for the whole grid.
        num_dst: number of destination tokens, one a whole cell.
        num_merged: r, how many tokens are merged away before attention.
        num_merged_for_agents: how many are merged away to make the agents; 0 where there are none.
    """

    action: Action
    reason: str
    grid: tuple[int, int]
    stride: tuple[int, int]
    tile: tuple[int, int] | None
    num_dst: int
    num_merged: int
    num_merged_for_agents: int

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_src(self) -> int:
        return self.num_tokens - self.num_dst

    @property
    def num_left(self) -> int:
        """Number of queries: the tokens after merging."""
        return self.num_tokens - self.num_merged

    @property
    def num_keys(self) -> int:
        return self.num_dst if self.action == "downsample" else self.num_left

    @property
    def num_agents(self) -> int:
        return self.num_tokens - self.num_merged_for_agents if self.action == "agents" else 0


def token_grid(latent_height: int, latent_width: int, downsample: int) -> tuple[int, int]:
    """(height, width) of the tokens at a level of the UNet. Every stride-2 downsampling of diffusers rounds up."""
    return -(-latent_height // downsample), -(-latent_width // downsample)


@lru_cache(maxsize=4096)
def plan_layer(config: AgentConfig, phase: Phase, grid: tuple[int, int]) -> LayerPlan:
    """Work out what a layer on a (height, width) grid does in a phase."""
    stride = config.stride(phase, grid)
    num_dst = grid_cells(*grid, stride)
    num_tokens = grid[0] * grid[1]
    num_src = num_tokens - num_dst
    tile = None if config.match_tile is None else tile_size(*grid, stride, config.match_tile)
    num_merged = min(num_src, config.num_merged(num_tokens, phase))

    def plan(action: Action, num_merged: int = 0, num_merged_for_agents: int = 0, reason: str = "") -> LayerPlan:
        return LayerPlan(action, reason, grid, stride, tile, num_dst, num_merged, num_merged_for_agents)

    if not config.acts_in(phase):
        nothing = "ratio=0" if config.late == "merge" else f'late="{config.late}"'
        return plan("none", reason=f"{nothing} leaves the {phase.value} phase to the model's own attention")
    if num_dst == 0:
        return plan("none", reason=f"its {grid[0]}×{grid[1]} grid is smaller than a cell")
    if phase is Phase.AGENT:
        return plan("agents", num_merged, config.num_merged_for_agents(num_tokens, num_src))
    if config.late == "downsample":
        return plan("downsample")
    if num_merged == 0:
        return plan("none", reason=f"ratio={config.ratio:g} merges none of its {num_tokens} tokens")
    return plan("merge", num_merged)


def draw_splits(
    plan: LayerPlan,
    config: AgentConfig,
    timestep: float | tuple[float, ...],
    num_layers: int,
    device: torch.device | str = "cpu",
) -> list[GridSplit]:
    """Choose the dsts of all layers with the same plan in one call: a few small kernels, whatever their number.

    Args:
        plan: what they do; its action is not "none".
        config: the settings.
        timestep: the noise level of the call, or one for each sample of the batch.
        num_layers: how many layers there are.
        device: where to.

    Returns:
        A split for each layer: of [N] tokens, or of [B, N] with a timestep for each sample.
    """
    if not config.use_rand:
        split = split_grid(*plan.grid, plan.stride, device=device, tile=plan.tile)
        if isinstance(timestep, tuple):
            split = GridSplit(split.tokens.expand(len(timestep), -1), split.dst_by_tile.expand(len(timestep), -1, -1))
        return [split] * num_layers
    cell_size = plan.stride[0] * plan.stride[1]

    def offsets(timestep: float) -> Tensor:
        return draw_offsets(config.seed, timestep, num_layers, plan.num_dst, cell_size, device)

    if isinstance(timestep, tuple):
        drawn = {one: offsets(one) for one in set(timestep)}
        all_offsets = torch.stack([drawn[one] for one in timestep], dim=1)  # [layers, B, cells]
    else:
        all_offsets = offsets(timestep)
    return split_grid(*plan.grid, plan.stride, all_offsets, tile=plan.tile).unbind()


def draw_offsets(
    seed: int, timestep: float, num_layers: int, cells: int, cell_size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw the place of the dst in each cell, for every layer of one UNet call.

    A stateless hash of (seed, timestep, layer, cell): the same arguments give the same draws on every device, no
    generator is read or advanced, and nothing is copied between host and device.

    Returns:
        [num_layers, cells] int64, uniform over 0 … cell_size − 1.
    """
    digest = hashlib.blake2b(struct.pack("<qd", seed, timestep), digest_size=4).digest()
    key = int.from_bytes(digest, "little")
    layer_keys = _mix32(torch.arange(num_layers, dtype=torch.int64, device=device) ^ key)
    drawn = _mix32(layer_keys[:, None] ^ torch.arange(cells, dtype=torch.int64, device=device))
    return drawn * cell_size >> 32


def _mix32(x: Tensor) -> Tensor:
    """Scramble 32-bit integers held in int64. Both factors are below 2**31, so no product overflows."""
    for factor in (0x7FEB352D, 0x297A2D39):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 15)


@dataclass(frozen=True)
class LayerCall:
    """A plan at work in one call of one layer, for the samples of one phase.

    Its counts are sizes of tensors: a compiled graph takes those as dynamic, where it would take an integer on a module
    as a constant and be compiled again for each image size and ratio.

    Attributes:
        action: as LayerPlan's.
        split: dsts and srcs; None where the action is "none".
        merged: [num_merged, 0] holds no element; its length is the number of tokens merged away before attention.
        merged_for_agents: [num_merged_for_agents, 0], in the same way.
        samples: [B'] numbers of the samples this is for; None for the whole batch.
    """

    action: Action
    split: GridSplit | None
    merged: Tensor
    merged_for_agents: Tensor
    samples: Tensor | None = None

    @property
    def num_merged(self) -> int:
        return self.merged.shape[0]

    @property
    def num_merged_for_agents(self) -> int:
        return self.merged_for_agents.shape[0]

    def match(self, block_input: Tensor) -> TokenMatching:
        """Match the tokens of [B', N, C], the un-normalised input of the transformer block.

        Raises:
            ValueError: the action is "none", which has no split.
        """
        if self.split is None:
            raise ValueError(f'action="{self.action}" matches no tokens: it has no split')
        # Offloading may bring the block's input to another device than the UNet was called with.
        return match_tokens(block_input, self.split.to(block_input.device))


def layer_call(plan: LayerPlan, split: GridSplit | None, samples: Tensor | None = None) -> LayerCall:
    """Put a plan and one of its splits together."""
    return LayerCall(
        plan.action, split, torch.empty(plan.num_merged, 0), torch.empty(plan.num_merged_for_agents, 0), samples
    )
