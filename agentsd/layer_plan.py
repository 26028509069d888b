"""What one layer does in one call: settings, phase and grid give stride, tile, counts and splits; torch only.

The same plan serves UNets of diffusers, ComfyUI, `describe` and `visualize`, so that none of them counts for itself.

    plan = plan_layer(config, Phase.AGENT, grid=(64, 64))                  # plain numbers, once per settings and grid
    calls = layer_calls(plan, config, timestep, layers=5, batch=2)        # what each of five layers does in this call
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .config import AgentConfig, Phase
from .grid_split import GridSplit, grid_cells, split_grid, tile_size
from .merging import MergeLayout, TokenMatching, lay_out, lay_out_by_sample, match_tokens

Action = Literal["agents", "grid agents", "merge", "downsample", "none"]


@dataclass(frozen=True)
class LayerPlan:
    """What a self-attention layer on one grid does in one phase, as plain numbers.

    Attributes:
        action: "agents" is agent attention on merged tokens, "grid agents" agent attention of all tokens through one
            token of each cell, "merge" softmax attention on merged tokens, "downsample" softmax attention to one token
            of each cell, "none" the model's own attention.
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
        if self.action == "grid agents":
            return self.num_dst
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
    if phase is Phase.AGENT and config.agents == "grid":
        return plan("grid agents")
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
    layers: int | Sequence[int],
    device: torch.device | str = "cpu",
) -> list[GridSplit]:
    """Choose the dsts of all layers with the same plan in one call, at once.

    Args:
        plan: what they do; its action is not "none".
        config: the settings.
        timestep: the noise level of the call, or one for each sample of the batch.
        layers: how many layers there are, or the numbers of those among them that the call reaches.
        device: where to.

    Returns:
        A split for each layer: of [N] tokens, or of [B, N] with a timestep for each sample. A layer's split is the same
        whichever other layers are asked for.
    """
    splits, number = _draw_splits(plan, config, timestep, layers, device)
    return splits.unbind() * number


def _draw_splits(
    plan: LayerPlan,
    config: AgentConfig,
    timestep: float | tuple[float, ...],
    layers: int | Sequence[int],
    device: torch.device | str,
) -> tuple[GridSplit, int]:
    """As draw_splits, in one GridSplit with a dimension for layers, and by how many layers each of its splits is used.

    That is 1, or the number of layers where all have the same split.
    """
    numbers = range(layers) if isinstance(layers, int) else layers
    by_sample = isinstance(timestep, tuple)
    timesteps = timestep if isinstance(timestep, tuple) else (timestep,)
    if config.use_rand:
        cell_size = plan.stride[0] * plan.stride[1]
        drawn = {one: _draw(config.seed, one, numbers, plan.num_dst, cell_size) for one in set(timesteps)}
        offsets = np.stack([drawn[one] for one in timesteps], axis=1)  # [layers, B or 1, cells]
    else:
        offsets = np.zeros((1, len(timesteps), plan.num_dst), dtype=np.int64)
    split = split_grid(*plan.grid, plan.stride, offsets if by_sample else offsets[:, 0], device, plan.tile)
    return split, 1 if config.use_rand else len(numbers)


def draw_offsets(
    seed: int, timestep: float, num_layers: int, cells: int, cell_size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw the place of the dst in each cell, for every layer of one UNet call.

    A stateless hash of (seed, timestep, layer, cell): the same arguments give the same draws, no generator is read or
    advanced, and the host does not wait for the device.

    Returns:
        [num_layers, cells] int64, uniform over 0 … cell_size − 1.
    """
    return torch.from_numpy(_draw(seed, timestep, range(num_layers), cells, cell_size)).to(device)


def _draw(seed: int, timestep: float, numbers: Sequence[int], cells: int, cell_size: int) -> np.ndarray:
    """As draw_offsets, for the layers with these numbers."""
    digest = hashlib.blake2b(struct.pack("<qd", seed, timestep), digest_size=4).digest()
    key = np.uint32(int.from_bytes(digest, "little"))
    layer_keys = _mix32(np.array(numbers, dtype=np.uint32) ^ key)
    drawn = _mix32(layer_keys[:, None] ^ np.arange(cells, dtype=np.uint32))
    return (drawn.astype(np.uint64) * np.uint64(cell_size) >> np.uint64(32)).astype(np.int64)


def _mix32(x: np.ndarray) -> np.ndarray:
    """Scramble uint32 integers, modulo 2**32."""
    for factor in (0x7FEB352D, 0x297A2D39):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(factor)
    return x ^ (x >> np.uint32(15))


@dataclass(frozen=True)
class LayerCall:
    """A plan at work in one call of one layer, for the samples of one phase.

    Its counts are sizes of tensors: a compiled graph takes those as dynamic, where it would take an integer on a module
    as a constant and be compiled again for each image size and ratio.

    Attributes:
        action: as LayerPlan's.
        split: dsts and srcs; None where the action is "none".
        layout: rows of the merged tokens, of the agents, or of both in this order; None where nothing is merged.
        merges_tokens: some tokens are merged away before attention.
        merges_agents: some are merged away to make the agents.
        samples: [B'] numbers of the samples this is for; None for the whole batch.
    """

    action: Action
    split: GridSplit | None = None
    layout: MergeLayout | None = None
    merges_tokens: bool = False
    merges_agents: bool = False
    samples: Tensor | None = None

    @property
    def num_merged(self) -> int:
        """r, how many tokens are merged away before attention."""
        return self.layout.counts[0] if self.layout is not None and self.merges_tokens else 0

    @property
    def num_merged_for_agents(self) -> int:
        """How many are merged away to make the agents."""
        return self.layout.counts[-1] if self.layout is not None and self.merges_agents else 0

    def match(self, block_input: Tensor) -> TokenMatching:
        """Match the tokens of [B', N, C], the un-normalised input of the transformer block.

        Raises:
            ValueError: the action is "none", which has no split.
        """
        if self.split is None:
            raise ValueError(f'action="{self.action}" matches no tokens: it has no split')
        # Offloading may bring the block's input to another device than the UNet was called with.
        return match_tokens(block_input, self.split.to(block_input.device))

    def layout_for(self, matching: TokenMatching) -> MergeLayout:
        """The layout on the device and for the batch of a matching: a video's frames are samples of their own."""
        assert self.layout is not None  # something is merged
        split, batch = matching.split, matching.batch
        if self.layout.batch == batch:
            return self.layout.to(split.tokens.device)
        counts = self.layout.counts
        return lay_out(split, batch, counts) if split.tokens.ndim == 1 else lay_out_by_sample(split, counts)


def layer_calls(
    plan: LayerPlan,
    config: AgentConfig,
    timestep: float | tuple[float, ...],
    layers: int | Sequence[int],
    batch: int,
    device: torch.device | str = "cpu",
    samples: Tensor | None = None,
) -> list[LayerCall]:
    """What all layers with the same plan do in one call, laid out at once: a few small kernels, whatever their number.

    Args:
        plan: what they do.
        config, timestep, layers, device: as draw_splits takes them.
        batch: number of samples.
        samples: as LayerCall's.
    """
    number = layers if isinstance(layers, int) else len(layers)
    if plan.action == "none":
        return [LayerCall("none", samples=samples)] * number
    splits, times = _draw_splits(plan, config, timestep, layers, device)
    counts = [r for r in (plan.num_merged, plan.num_merged_for_agents) if r]
    layouts: list[MergeLayout] | list[None] = [None] * (number // times)
    if counts:
        by_sample = isinstance(timestep, tuple)
        layouts = (lay_out_by_sample(splits, counts) if by_sample else lay_out(splits, batch, counts)).unbind()
    merges = bool(plan.num_merged), bool(plan.num_merged_for_agents)
    calls = [LayerCall(plan.action, split, layout, *merges, samples) for split, layout in zip(splits.unbind(), layouts)]
    return calls * times
