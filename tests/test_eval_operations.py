"""eval/common/operations.py and calls/hooks.py: what counts as an operation, and the hooks' own time."""

from __future__ import annotations

import pytest
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


# Of a call of SD 1.5 at 512 px: the unpatched model's, and the most that the patch may make of them.
BOUNDS = {
    "agent phase": 820,
    "agent phase, agents from a grid": 775,
    "later, merging": 800,
    "cached, agent phase": 100,
    "cached, later": 95,
    "cached, nothing merged": 80,
}


def test_calls_of_sd15_run_no_more_operators_than_they_may():
    from eval.calls.operators import count_operators
    from eval.forecast.networks import Network, Shape

    counts = count_operators(Network(Shape("sd15", 512)))
    assert counts.pop("unpatched") == 728  # as the forecast's page says; it changes with diffusers only
    assert set(counts) == set(BOUNDS)
    assert all(counts[name] <= most for name, most in BOUNDS.items()), counts


def test_a_patched_layer_adds_no_more_operators_than_it_may():
    """What a layer adds, and not what is laid out once a call for all of them: by the difference of two networks."""
    from eval.calls.operators import count_operators
    from eval.forecast.networks import Network, Shape

    def counts(layers_per_block):
        config = dict(
            block_out_channels=(32,), layers_per_block=layers_per_block, norm_num_groups=8, cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            attention_head_dim=4, sample_size=16,
        )  # fmt: skip
        return count_operators(Network(Shape("sd15", 128), config))

    fewer, more = counts(1), counts(2)  # 4 and 6 layers
    unpatched = more["unpatched"] - fewer["unpatched"]
    added = {name: (more[name] - fewer[name] - unpatched) / 2 for name in more}
    assert added["agent phase"] <= 15 and added["later, merging"] <= 13
    assert added["agent phase, agents from a grid"] <= 2


def test_a_shape_that_is_none_is_refused_with_the_remedy():
    from eval.calls.operators import operator_table
    from eval.common.protocol import BenchError

    for text in ("sd15", "sd15:500", "sd3:512", "sdxl:big"):
        with pytest.raises(BenchError, match="as in sd15:512"):
            operator_table([text])
