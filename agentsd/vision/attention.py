"""The agent attention module of vision transformers: agents pooled from the queries, agent bias, depthwise convolution.

Source: Han et al., "Agent Attention", ECCV 2024 (arXiv 2312.08874), section "Agent attention module". The arithmetic
equals `agentsd.attention.agent_attention` with the standard scale twice and no α-mixing: the depthwise convolution on
the values restores the diversity. It is written out here, since TorchScript does not take that function's autocast.
"""

import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from .bias import AgentBias


@register_notrace_module  # reason: what is kept, and sizes that decide what is computed
class AgentCore(AgentBias):
    """Agent attention on queries, keys and values that are projected already; the projections belong to a subclass.

    Args:
        dim: channels.
        num_heads: divides dim.
        Others: as in AgentBias.

    Raises:
        ValueError: num_heads does not divide dim; those of AgentBias.
    """

    def __init__(self, dim: int, num_heads: int, num_agents: int, grid: tuple[int, int], **bias):
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads}: must divide the {dim} channels")
        super().__init__(num_heads, num_agents, grid, **bias)
        self.num_heads = num_heads

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int]) -> Tensor:
        """softmax(Q Aᵀ / √d + B₂) · softmax(A Kᵀ / √d + B₁) V, the heads joined.

        Args:
            query, key, value: [B, N, C]; a class token, if the module has one, comes first.
            grid: (height, width) of the other tokens.

        Returns:
            [B, N, C].
        """
        agents = self.pool_agents(query, grid)
        aggregation_bias, broadcast_bias = self.current_biases(grid, query.dtype)
        agents = self.split(agents)
        agent_values = F.scaled_dot_product_attention(
            agents, self.split(key), self.split(value), attn_mask=aggregation_bias
        )
        out = F.scaled_dot_product_attention(self.split(query), agents, agent_values, attn_mask=broadcast_bias)
        return out.transpose(1, 2).flatten(2)

    def without_class_token(self, value: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the depthwise convolution reads: [B, N, C] -> [B, C, height, width], without the class token."""
        return to_image(value[:, int(self.has_class_token) :].contiguous(), grid)  # so channels are last in memory

    def with_class_token(self, image: Tensor) -> Tensor:
        """The inverse of without_class_token, with zeros for the class token."""
        tokens = from_image(image)
        if self.has_class_token:
            tokens = F.pad(tokens, (0, 0, 1, 0))
        return tokens

    def pool_agents(self, query: Tensor, grid: tuple[int, int]) -> Tensor:
        """The agents: averages of the queries over the cells of a square grid, without the class token; [B, A, C]."""
        tokens = query[:, int(self.has_class_token) :]
        # Contiguous tokens have their channels last in memory, as pooling and the fused kernels want them.
        image = to_image(tokens.contiguous(), grid)
        return from_image(F.adaptive_avg_pool2d(image, self.agent_grid)).contiguous()

    def split(self, tokens: Tensor) -> Tensor:
        """[B, N, C] -> [B, heads, N, head_dim]."""
        return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def weights(self, query: Tensor, key: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Both softmaxes, for maps of the attention.

        Args:
            As for `attend`.

        Returns:
            (aggregation [B, heads, A, N], broadcast [B, heads, N, A]); the last dimension sums to 1.
        """
        agents = self.split(self.pool_agents(query, grid))
        scale = agents.shape[-1] ** -0.5
        aggregation_bias, broadcast_bias = self.biases(grid, query.dtype)
        aggregation = agents @ self.split(key).mT * scale
        broadcast = self.split(query) @ agents.mT * scale
        if aggregation_bias is not None:
            aggregation, broadcast = aggregation + aggregation_bias, broadcast + broadcast_bias
        return aggregation.softmax(-1), broadcast.softmax(-1)


class AgentAttention(AgentCore):
    """Agent attention with a joint projection of queries, keys and values, as Agent-DeiT and Agent-Swin have it.

    Args:
        qkv_bias: biases in the projection of queries, keys and values.
        proj_drop: dropout after the output projection.
        use_conv: False leaves the depthwise convolution out (an ablation).
        Others: as in AgentCore.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_agents: int,
        grid: tuple[int, int],
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        use_conv: bool = True,
        device=None,
        dtype=None,
        **bias,
    ):
        super().__init__(dim, num_heads, num_agents, grid, device=device, dtype=dtype, **bias)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dwc = depthwise_conv(dim, device, dtype) if use_conv else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, N, C] each."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return query, key, value

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, N, C] -> [B, N, C]; grid is the (height, width) of the tokens without the class token."""
        query, key, value = self.project(x)
        out = self.attend(query, key, value, grid)
        if self.dwc is not None:
            out = out + self.with_class_token(self.dwc(self.without_class_token(value, grid)))
        return self.proj_drop(self.proj(out))


class SeparateAgentAttention(AgentCore):
    """Agent attention with one projection for queries and one for keys and values, as Agent-PVT has it."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_agents: int,
        grid: tuple[int, int],
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
        **bias,
    ):
        super().__init__(dim, num_heads, num_agents, grid, device=device, dtype=dtype, **bias)
        self.q = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.kv = nn.Linear(dim, 2 * dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dwc = depthwise_conv(dim, device, dtype)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, N, C] each."""
        key, value = self.kv(x).chunk(2, dim=-1)
        return self.q(x), key, value

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        query, key, value = self.project(x)
        out = self.attend(query, key, value, grid)
        out = out + self.with_class_token(self.dwc(self.without_class_token(value, grid)))
        return self.proj_drop(self.proj(out))


def depthwise_conv(dim: int, device=None, dtype=None) -> nn.Conv2d:
    """The 3 × 3 depthwise convolution that is applied to the values."""
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)


def to_image(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, h·w, C] -> [B, C, h, w]."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def grid_of(image: Tensor) -> tuple[int, int]:
    """(height, width) of [B, C, h, w]."""
    height, width = image.shape[-2:]
    return height, width


def from_image(image: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h·w, C], the inverse of to_image."""
    return image.flatten(2).transpose(1, 2)
