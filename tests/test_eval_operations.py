"""eval/common/operations.py and calls/hooks.py: what counts as an operation, and the hooks' own time."""

from __future__ import annotations

import torch
from conftest import make_unet

import agentsd
from eval.calls import hooks
from eval.common.operations import count_operations


def test_views_and_allocations_are_not_counted():
    x = torch.ones(2, 3)

    def call():
        y = x.view(3, 2).transpose(0, 1)[:1]
        torch.empty(4)
        return y + 1, torch.nn.functional.linear(x, torch.ones(4, 3)), x.chunk(3, dim=1)

    assert count_operations(call) == 3  # ones, the sum, the product


def test_hooks_are_timed_call_by_call():
    """Every call has a time, none of which is asserted; a run reads the device once for its latents."""
    unet = make_unet()
    agentsd.apply_patch(unet, cache_interval=3, ratio=0.0, early=0.0)
    with hooks.CountReads() as counted:
        times = hooks.hook_times(unet, 16, 20)
    assert [kind for kind, _ in times].count("cached") > 10 and len(times) == 20 and counted.reads == 1
