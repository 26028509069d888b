"""Stage counts: parameters and multiply-adds of models, without memory or time for their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .models import build, published_size
from .paper import AGENT


def count(name: str, size: int) -> tuple[int, float]:
    """(parameters, billions of multiply-adds of one image) of a model for size × size pixels.

    Multiply-adds are PyTorch's count of matrix products and convolutions, halved; norms, pooling and resizing of biases
    are not in it (less than 1 %).
    """
    model = build(name, size)
    # The math kernel, so that the products inside attention are counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e9


def rows() -> list[dict[str, Any]]:
    """One row per published model: counted and reported."""
    found = []
    for name, reported in AGENT.items():
        size = published_size(name)
        parameters, gmacs = count(name, size)
        found.append(
            {
                "model": name,
                "size": size,
                "parameters": parameters,
                "paper_parameters_m": reported.parameters,
                "gmacs": gmacs,
                "paper_gmacs": reported.gmacs,
                "paper_top1": reported.top1,
            }
        )
    return found
