"""eval/common/operations.py: what counts as an operation."""

from __future__ import annotations

import torch

from eval.common.operations import count_operations


def test_views_and_allocations_are_not_counted():
    x = torch.ones(2, 3)

    def call():
        y = x.view(3, 2).transpose(0, 1)[:1]
        torch.empty(4)
        return y + 1, torch.nn.functional.linear(x, torch.ones(4, 3)), x.chunk(3, dim=1)

    assert count_operations(call) == 3  # ones, the sum, the product
