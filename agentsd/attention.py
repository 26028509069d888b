"""Agent attention: a few agent tokens gather from keys and values and hand on to the queries; torch only.

Source: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024 (arXiv 2312.08874),
equations 4–6 for the two softmaxes and appendix B for its use without training in Stable Diffusion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def agent_attention(
    query: Tensor,
    agents: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float = 0.075,
    broadcast_exponent: float = -0.15,
    upcast: bool = False,
    aggregation_bias: Tensor | None = None,
    broadcast_bias: Tensor | None = None,
) -> Tensor:
    """Attention through agents: O = softmax(s · Q Aᵀ + B₂) · softmax(A Kᵀ / √d + B₁) V + α V.

    The scale s is d ** broadcast_exponent; the biases B₁ and B₂ are optional.

    The agents *aggregate* with the standard scale d ** −0.5 and *broadcast* with the raised one: two softmaxes in a row
    smooth too much for a network that was not trained for it. α V brings back the diversity that few agents lose.
    Cost: 4 · M · num_agents · d multiply–adds per head in place of 2 · M² · d.

    Args:
        query: [B, heads, M, head_dim].
        agents: [B, heads, num_agents, head_dim], projected like the queries.
        key, value: [B, heads, M, head_dim]; as many as queries when α ≠ 0.
        alpha: weight of the α-mixing term.
        broadcast_exponent: −0.5 is the standard softmax scale.
        upcast: compute in float32 whatever the inputs' type, for logits beyond float16's range.
        aggregation_bias: B₁, added to the logits of the agents: broadcastable to [B, heads, num_agents, M].
        broadcast_bias: B₂, added to the logits of the queries: broadcastable to [B, heads, M, num_agents]. Trained
            vision models have both (the paper's agent bias); Stable Diffusion has none.

    Returns:
        [B, heads, M, head_dim] in value's dtype.

    Raises:
        ValueError: α ≠ 0 and the number of values differs from the number of queries.
    """
    if alpha != 0 and query.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"α-mixing adds value i to query i: {query.shape[-2]} queries and {value.shape[-2]} values need alpha=0"
        )
    agent_values = softmax_attention(agents, key, value, upcast=upcast, bias=aggregation_bias)
    scale = query.shape[-1] ** broadcast_exponent
    out = softmax_attention(query, agents, agent_values, scale=scale, upcast=upcast, bias=broadcast_bias)
    return out.add(value, alpha=alpha) if alpha != 0 else out


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    upcast: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """Standard attention by PyTorch's fused kernels: softmax(scale · Q Kᵀ + bias) V.

    The scale is head_dim ** −0.5 unless given.

    Args and returns as `agent_attention`; `upcast` computes logits, softmax and sums in float32, under
    autocast too. `bias` is broadcastable to [B, heads, queries, keys], of any floating dtype.
    """
    if upcast:
        with torch.autocast(query.device.type, enabled=False):  # it would cast them right back
            out = _attend(query.float(), key.float(), value.float(), scale, bias)
        return out.to(value.dtype)
    return _attend(query, key, value, scale, bias)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, bias: Tensor | None) -> Tensor:
    if bias is None:  # no mask argument at all: the kernels chosen are those of a call without one
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), scale=scale)
