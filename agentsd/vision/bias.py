"""The agent bias: two learned biases of a trained agent attention, resized to any grid.

Source: Han et al., "Agent Attention", ECCV 2024 (arXiv 2312.08874), section "Agent bias".
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

BLOCK = 7
"""Side of the block bias, which is resized to the grid."""

MOST_KEPT = 2**21
"""Numbers in one bias that are kept at most, 8 MB in float32. Classifiers stay below it; detectors with more agents on
large images, whose layers would keep more than a gigabyte together, compute their biases in each call."""


class _Kept(NamedTuple):
    """Biases, and copies of what they were computed from."""

    grid: tuple[int, int]
    dtype: torch.dtype
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

    __constants__ = ["has_bias", "has_class_token"]  # TorchScript leaves out the branches that these exclude

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
        """The biases of both softmaxes for a grid of any size, computed from the parameters as they are now.

        Args:
            grid: (height, width) of the tokens.
            dtype: of the attention that they are added to.

        Returns:
            (B₁, B₂): [1, heads, agents, N] and [1, heads, N, agents], N with the class token (first); None twice where
            they are disabled.
        """
        aggregation: Tensor | None = None
        broadcast: Tensor | None = None
        if self.has_bias:
            class_of_agents: Tensor | None = None
            class_of_tokens: Tensor | None = None
            if self.has_class_token:
                class_of_agents, class_of_tokens = self.ac_bias, self.ca_bias
            aggregation, broadcast = resized_biases(
                self.an_bias,
                self.na_bias,
                self.ah_bias,
                self.aw_bias,
                self.ha_bias,
                self.wa_bias,
                class_of_agents,
                class_of_tokens,
                grid,
                self.trained_side,
                self.agent_grid,
                dtype,
            )
        return aggregation, broadcast

    def current_biases(self, grid: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """As `biases`, for the forward pass, which only reads them: in eval on the CPU, those of the last call serve
        again while every number of every parameter is the same. Everywhere else they are computed.
        """
        if torch.jit.is_scripting():
            return self.biases(grid, dtype)
        else:  # TorchScript compiles what stands after a return, but not this branch
            return self._kept_biases(grid, dtype)

    def _kept_biases(self, grid: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        parameters = [getattr(self, name) for name in self._names]
        if not self._can_keep(parameters, grid):
            return self.biases(grid, dtype)
        kept = self._kept
        if (
            kept is None
            or kept.grid != grid
            or kept.dtype != dtype
            # The numbers, not versions or addresses: fused optimizers and writes through .data change neither.
            or not all(
                new.dtype == old.dtype and torch.equal(new, old) for new, old in zip(parameters, kept.parameters)
            )
        ):
            # Tensors made in inference mode could not serve a later call that needs gradients of its input.
            with torch.inference_mode(False), torch.no_grad():
                copies = [parameter.detach().clone() for parameter in parameters]
                classes = copies[6:] or [None, None]
                biases = resized_biases(*copies[:6], *classes, grid, self.trained_side, self.agent_grid, dtype)
            kept = self._kept = _Kept(grid, dtype, copies, biases)
        return kept.biases

    def _can_keep(self, parameters: list, grid: tuple[int, int]) -> bool:
        """Whether biases computed now are plain tensors that depend on the numbers in the parameters alone."""
        if not self.has_bias or self.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        # Parameters that something else stands for (functional_call, a parametrization, symbolic tracing, a fake or
        # distributed tensor) have another type. On other devices than the CPU, comparing would wait for the device.
        if not all(type(p) is nn.Parameter and p.device.type == "cpu" for p in parameters):
            return False
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            return False  # the graph of this call
        if _tensors_are_intercepted():
            return False
        return self.an_bias.shape[0] * self.agent_grid**2 * grid[0] * grid[1] <= MOST_KEPT

    def train(self, mode: bool = True):
        self._kept = None  # for the memory
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        self._kept = None

        def on_any_rank(tensor: Tensor) -> Tensor:
            # PyTorch moves every tensor of rank 4 or 5 to the memory format that is asked for, and there are formats
            # of rank 4 alone. The biases of rank 5 have one axis of the grid each, so their order is that of a line.
            return fn(tensor.reshape(-1)).view(tensor.shape) if tensor.dim() == 5 else fn(tensor)

        return super()._apply(on_any_rank, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None}  # neither copied nor saved


def _tensors_are_intercepted() -> bool:
    """Whether a mode or a transform (FakeTensorMode, vmap, grad) makes other tensors than plain ones of operations.

    Where this version of PyTorch cannot say, yes: then nothing is kept, which is slower and right.
    """
    modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)()
    return modes > 0 or getattr(torch._C, "_are_functorch_transforms_active", lambda: True)()


@torch.fx.wrap
@register_notrace_function  # reason: sizes decide what is computed
def resized_biases(
    an: Tensor,
    na: Tensor,
    ah: Tensor,
    aw: Tensor,
    ha: Tensor,
    wa: Tensor,
    ac: Tensor | None,
    ca: Tensor | None,
    grid: tuple[int, int],
    trained_side: int,
    agent_grid: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The biases of both softmaxes from the parameters of AgentBias.

    Args:
        an, na: [H, A, 7, 7] block biases of the first and the second softmax.
        ah, aw: [1, H, A, h, 1] and [1, H, A, 1, w] biases per row and per column of the first.
        ha, wa: [1, H, h, 1, A] and [1, H, 1, w, A] those of the second.
        ac, ca: [1, H, A, 1] and [1, H, 1, A] biases of a class token; None without.
        grid: (height, width) of the tokens.
        trained_side, agent_grid: side of the agents' grid in training and now.
        dtype: of the result.

    Returns:
        [1, H, agents, N] and [1, H, N, agents], contiguous, as the fused kernels want them.
    """
    height, width = grid
    lines = _resized(ah[0], height, 1) + _resized(aw[0], 1, width)
    aggregation = (_resized(an, height, width) + lines).flatten(2)  # H A N
    # Here the agents come last: computed so from the start, no large copy is needed.
    block = _resized(na.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), height, width).permute(0, 2, 3, 1)
    rows = _resized(ha[0].permute(0, 3, 1, 2), height, 1).permute(0, 2, 3, 1)
    columns = _resized(wa[0].permute(0, 3, 1, 2), 1, width).permute(0, 2, 3, 1)
    broadcast = (block + (rows + columns)).flatten(1, 2)  # H N A
    if ac is not None and ca is not None:
        aggregation = torch.cat([ac[0].to(aggregation.dtype), aggregation], dim=2)
        broadcast = torch.cat([ca[0].to(broadcast.dtype), broadcast], dim=1)
    if agent_grid != trained_side:
        agents = (trained_side, trained_side)
        aggregation = _resized(aggregation.mT.unflatten(2, agents), agent_grid, agent_grid).flatten(2).mT
        broadcast = _resized(broadcast.unflatten(2, agents), agent_grid, agent_grid).flatten(2)
    return aggregation[None].to(dtype).contiguous(), broadcast[None].to(dtype).contiguous()


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    """Resize [N, C, h, w] bilinearly, in float32 where the parameters are of half precision."""
    if images.dtype == torch.float16 or images.dtype == torch.bfloat16:
        images = images.float()
    if images.shape[2] == height and images.shape[3] == width:
        return images
    return F.interpolate(images, size=[height, width], mode="bilinear", align_corners=False)
