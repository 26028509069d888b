"""The agent bias: two learned biases of a trained agent attention, resized to any grid and kept for the next image.

Source: Han et al., "Agent Attention", ECCV 2024 (arXiv 2312.08874), section "Agent bias".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 7
"""Side of the block bias, which is resized to the grid."""

MOST_KEPT = 2**21
"""Numbers in one bias that are kept at most, 8 MB in float32. Classifiers stay below it; detectors with more agents on
large images, whose layers would keep more than a gigabyte together, compute their biases in each call."""


class _Kept(NamedTuple):
    """Biases, and what they were computed from."""

    state: tuple[tuple[int, int], torch.dtype, list[tuple[int, int]]]
    parameters: list[Tensor]
    biases: tuple[Tensor, Tensor]


class AgentBias(nn.Module):
    """Holder of the bias parameters; a base class, so that they stand beside the projections in a state dict.

    The bias of agent a and the token at row y, column x is block(a, y, x) + rows(a, y) + columns(a, x): a small map
    that is resized to the grid, and one bias per row and per column. A class token has a bias of its own per agent.

    Args:
        num_heads: each head has its own biases.
        num_agents: agents in training, a square number.
        grid: (height, width) of the tokens in training.
        class_token: also hold a bias for the class token.
        agent_grid: side of the agents' grid at run time; None takes the one of training. Dense prediction uses more
            agents than were trained: the biases are resized over the agents too.
        enabled: False leaves the biases out (an ablation).

    Raises:
        ValueError: num_agents is no square number, or agent_grid is below 1.
    """

    def __init__(
        self,
        num_heads: int,
        num_agents: int,
        grid: tuple[int, int],
        class_token: bool = False,
        agent_grid: int | None = None,
        enabled: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        side = math.isqrt(num_agents) if num_agents > 0 else 0
        if side < 1 or side * side != num_agents:
            raise ValueError(
                f"num_agents={num_agents}: agents are pooled to a square grid; give a square number such as 9, 16 or 49"
            )
        if agent_grid is not None and agent_grid < 1:
            raise ValueError(f"agent_grid={agent_grid}: must be at least 1, or None for that of training ({side})")
        self.trained_side = side
        self.agent_grid = agent_grid or side
        self.has_class_token = class_token
        self.has_bias = enabled
        self._kept: _Kept | None = None
        self._names: tuple[str, ...] = ()
        if not enabled:
            return
        height, width = grid

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.an_bias = parameter(num_heads, num_agents, BLOCK, BLOCK)
        self.na_bias = parameter(num_heads, num_agents, BLOCK, BLOCK)
        self.ah_bias = parameter(1, num_heads, num_agents, height, 1)
        self.aw_bias = parameter(1, num_heads, num_agents, 1, width)
        self.ha_bias = parameter(1, num_heads, height, 1, num_agents)
        self.wa_bias = parameter(1, num_heads, 1, width, num_agents)
        self._names = ("an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias")
        if class_token:
            self._names += ("ac_bias", "ca_bias")
            self.ac_bias = parameter(1, num_heads, num_agents, 1)
            self.ca_bias = parameter(1, num_heads, 1, num_agents)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the biases as the authors do."""
        for name in self._names:
            nn.init.trunc_normal_(getattr(self, name), std=0.02)

    def biases(self, grid: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The biases of both softmaxes for a grid of any size.

        In eval they are computed once and kept for the latest grid, up to MOST_KEPT numbers. A change of the parameters
        that PyTorch can see (an optimizer's step, a load, a move) makes them anew; after writing through `.data`, call
        `drop_biases`.

        Args:
            grid: (height, width) of the tokens.
            dtype: of the attention that they are added to.

        Returns:
            (B₁, B₂): [1, heads, agents, N] and [1, heads, N, agents], N with the class token (first); None twice where
            they are disabled.
        """
        if not self.has_bias:
            return None, None
        too_many = self.an_bias.shape[0] * self.agent_grid**2 * grid[0] * grid[1] > MOST_KEPT
        if self.training or too_many or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._compute(grid, dtype)
        parameters = [getattr(self, name) for name in self._names]
        needs_graph = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        if needs_graph or any(p.is_inference() for p in parameters):
            return self._compute(grid, dtype)
        state = (grid, dtype, [(p._version, p.data_ptr()) for p in parameters])
        kept = self._kept
        # Holding the parameters themselves, so that a new one cannot have the address of an old one.
        if kept is None or kept.state != state or any(p is not q for p, q in zip(parameters, kept.parameters)):
            # Tensors made in inference mode could not serve a later call that needs gradients of its input.
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept = _Kept(state, parameters, self._compute(grid, dtype))
        return kept.biases

    def drop_biases(self) -> None:
        """Forget the biases that are kept for the latest grid."""
        self._kept = None

    def _compute(self, grid: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        class_of_agents = class_of_tokens = None
        if self.has_class_token:
            class_of_agents, class_of_tokens = self.ac_bias[0], self.ca_bias[0].mT
        aggregation = self._resized(self.an_bias, self.ah_bias[0], self.aw_bias[0], class_of_agents, grid)
        # The token comes before the agent in these shapes: (1, H, h, 1, A) -> (H, A, h, 1).
        rows, columns = self.ha_bias[0].movedim(-1, 1), self.wa_bias[0].movedim(-1, 1)
        broadcast = self._resized(self.na_bias, rows, columns, class_of_tokens, grid)
        return aggregation[None].to(dtype), broadcast.mT[None].to(dtype).contiguous()

    def _resized(
        self, block: Tensor, rows: Tensor, columns: Tensor, class_token: Tensor | None, grid: tuple[int, int]
    ) -> Tensor:
        """[H, agents, N] from [H, A, 7, 7], [H, A, h, 1], [H, A, 1, w] and [H, A, 1]."""
        height, width = grid
        bias = _resize(block, grid) + (_resize(rows, (height, 1)) + _resize(columns, (1, width)))
        bias = bias.flatten(2)
        if class_token is not None:
            bias = torch.cat([class_token.to(bias.dtype), bias], dim=2)
        if self.agent_grid == self.trained_side:
            return bias
        heads, _, tokens = bias.shape
        over_agents = bias.mT.reshape(heads, tokens, self.trained_side, self.trained_side)
        return _resize(over_agents, (self.agent_grid, self.agent_grid)).flatten(2).mT.contiguous()

    def train(self, mode: bool = True):
        self.drop_biases()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        self.drop_biases()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.drop_biases()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None}  # neither copied nor saved


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [N, C, h, w] bilinearly, in float32 where the parameters are of half precision."""
    images = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
