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
) -> Tensor:
    """Attention through agents: O = softmax(s · Q Aᵀ) · softmax(A Kᵀ / √d) V + α V, with s = d ** broadcast_exponent.

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

    Returns:
        [B, heads, M, head_dim] in value's dtype.

    Raises:
        ValueError: α ≠ 0 and the number of values differs from the number of queries.
    """
    if alpha != 0 and query.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"α-mixing adds value i to query i: {query.shape[-2]} queries and {value.shape[-2]} values need alpha=0"
        )
    agent_values = softmax_attention(agents, key, value, upcast=upcast)
    scale = query.shape[-1] ** broadcast_exponent
    out = softmax_attention(query, agents, agent_values, scale=scale, upcast=upcast)
    return out.add(value, alpha=alpha) if alpha != 0 else out


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, upcast: bool = False
) -> Tensor:
    """Standard attention by PyTorch's fused kernels: softmax(scale · Q Kᵀ) V, scale = head_dim ** −0.5 unless given.

    Args and returns as `agent_attention`; `upcast` computes logits, softmax and sums in float32, under
    autocast too.
    """
    if upcast:
        with torch.autocast(query.device.type, enabled=False):  # it would cast them right back
            out = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), scale=scale)
        return out.to(value.dtype)
    return F.scaled_dot_product_attention(query, key, value, scale=scale)
