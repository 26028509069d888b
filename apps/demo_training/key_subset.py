"""Cheaper training of the full-resolution self-attention: all queries, one key out of each cell of the grid."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class SubsetAttnProcessor:
    """An attention processor for training whose keys and values are those of the `chosen` tokens alone.

    Attributes:
        chosen: token numbers [keys], int64, on the layer's device; None for all of them.
    """

    def __init__(self) -> None:
        self.chosen: Tensor | None = None

    def __call__(self, attn, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """[B, N, C] to [B, N, C]: self-attention of N queries to the chosen keys."""
        seen = hidden_states if self.chosen is None else hidden_states[:, self.chosen]

        def heads_of(tokens: Tensor) -> Tensor:
            return tokens.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        mixed = functional.scaled_dot_product_attention(
            heads_of(attn.to_q(hidden_states)), heads_of(attn.to_k(seen)), heads_of(attn.to_v(seen)), scale=attn.scale
        )
        return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(-2)))


def one_per_cell(side: int, stride: int, generator: torch.Generator) -> Tensor:
    """Token numbers of one random token in each stride × stride cell of a side × side grid: [(side // stride)²]."""
    cells = torch.arange(side // stride) * stride
    rows, columns = torch.randint(stride, (2, len(cells), len(cells)), generator=generator)
    return ((cells[:, None] + rows) * side + cells + columns).flatten()
