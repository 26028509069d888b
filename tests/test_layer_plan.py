"""layer_plan.py: against naive counts and loops."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch

from agentsd import AgentConfig, Phase
from agentsd.layer_plan import draw_offsets, draw_splits, layer_calls, plan_layer, token_grid
from agentsd.merging import match_tokens, merge_each, merge_tokens

# --- the numbers of a layer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(64, 64), (19, 13), (1, 2), (33, 8)])
def test_the_grid_is_that_of_convolutions_of_stride_two(height, width):
    x = torch.zeros(1, 1, height, width)
    for downsample in (1, 2, 4, 8):
        assert token_grid(height, width, downsample) == tuple(x.shape[-2:])
        x = torch.nn.functional.conv2d(x, torch.zeros(1, 1, 3, 3), stride=2, padding=1)


def naive_counts(grid, stride):
    """(tokens, dsts) of a grid, cell by cell."""
    (height, width), (rows, columns) = grid, stride
    dsts = sum(1 for y in range(0, height, rows) for x in range(0, width, columns)
               if y + rows <= height and x + columns <= width)  # fmt: skip
    return height * width, dsts


@pytest.mark.parametrize("grid", [(16, 16), (9, 14), (4, 31), (5, 4)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"ratio": 0.75}, {"early_ratio": 0.0}, {"agent_ratio": 0.5}, {"agent_stride": (2, 3), "merge_stride": (1, 4)}],
    ids=str,
)
def test_counts_of_merging_equal_naive_counts(grid, settings):
    config = AgentConfig(**settings)
    sides = {"agent": config.agent_stride, "merge": config.merge_stride}
    for phase in Phase:
        side = sides[phase.value]
        tokens, dsts = naive_counts(grid, (side, side) if isinstance(side, int) else side)
        merged = min(int(tokens * config.ratio_in(phase)), tokens - dsts)
        plan = plan_layer(config, phase, grid)
        assert (plan.num_tokens, plan.num_dst, plan.num_src) == (tokens, dsts, tokens - dsts)
        assert plan.num_left == plan.num_keys == tokens - merged
        if phase is Phase.AGENT:
            assert plan.action == "agents"
            assert plan.num_agents == tokens - min(int(tokens * config.agent_ratio), tokens - dsts)
        else:
            assert plan.action == "merge" and plan.num_agents == 0


def test_actions_without_merging_count_the_cells():
    grid_agents = plan_layer(AgentConfig(agents="grid"), Phase.AGENT, (9, 14))
    assert grid_agents.action == "grid agents"
    assert (grid_agents.num_left, grid_agents.num_keys, grid_agents.num_agents) == (126, 126, 2 * 3)
    downsampled = plan_layer(AgentConfig(late="downsample"), Phase.MERGE, (9, 14))
    assert downsampled.action == "downsample"
    assert (downsampled.num_left, downsampled.num_keys, downsampled.num_agents) == (126, 4 * 7, 0)


@pytest.mark.parametrize(
    "settings, phase, grid, reason",
    [
        ({"ratio": 0.0}, Phase.MERGE, (8, 8), "ratio=0 leaves the merge phase to the model's own attention"),
        ({"late": "full"}, Phase.MERGE, (8, 8), 'late="full" leaves the merge phase'),
        ({}, Phase.AGENT, (3, 8), "3×8 grid is smaller than a cell"),
        ({"ratio": 0.01}, Phase.MERGE, (8, 8), "ratio=0.01 merges none of its 64 tokens"),
    ],
)
def test_a_layer_that_does_nothing_says_why(settings, phase, grid, reason):
    config = AgentConfig(**settings)
    plan = plan_layer(config, phase, grid)
    assert plan.action == "none" and reason in plan.reason and plan.num_left == plan.num_keys == grid[0] * grid[1]
    calls = layer_calls(plan, config, 500.0, 3, batch=2)
    assert len(calls) == 3 and all(call.split is None and call.layout is None for call in calls)
    with pytest.raises(ValueError, match='action="none" matches no tokens'):
        calls[0].match(torch.zeros(2, 64, 4))


def test_a_layer_that_does_something_gives_no_reason():
    assert all(plan_layer(AgentConfig(), phase, (8, 8)).reason == "" for phase in Phase)


# --- draws ----------------------------------------------------------------------------------------------------------


def naive_draw(seed, timestep, layer, cell, cell_size):
    """The hash as the first release computed it, in Python's integers."""

    def mix(x):
        for factor in (0x7FEB352D, 0x297A2D39):
            x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
        return x ^ (x >> 15)

    digest = hashlib.blake2b(struct.pack("<qd", seed, timestep), digest_size=4).digest()
    return mix(mix(layer ^ int.from_bytes(digest, "little")) ^ cell) * cell_size >> 32


def test_draws_are_a_pure_function():
    state = torch.get_rng_state()
    draws = draw_offsets(3, 981, 5, 256, 16)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draws, draw_offsets(3, 981.0, 5, 256, 16))
    assert draws.shape == (5, 256) and draws.min() == 0 and draws.max() == 15
    for other in (draw_offsets(4, 981, 5, 256, 16), draw_offsets(3, 961, 5, 256, 16), draws.roll(1, 0)):
        assert (draws == other).float().mean() < 0.15  # 1/16 by chance
    assert draw_offsets(2**63 - 1, 0.5, 1, 3, 4).max() < 4


@pytest.mark.parametrize("cell_size", [4, 6, 16])
def test_draws_are_uniform(cell_size):
    draws = draw_offsets(0, 500, 8, 4096, cell_size)
    counts = torch.bincount(draws.flatten(), minlength=cell_size).double()
    expected = draws.numel() / cell_size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 45  # 99.99 % quantile at 15 degrees of freedom


def test_draws_stay_those_of_the_first_release():
    for seed, timestep, cell_size in ((0, 981.0, 16), (2**63 - 1, 0.5, 6), (7, 999.0, 4)):
        drawn = draw_offsets(seed, timestep, 12, 70, cell_size).tolist()
        assert drawn == [[naive_draw(seed, timestep, i, j, cell_size) for j in range(70)] for i in range(12)]


@pytest.mark.parametrize("grid, stride", [((9, 14), (2, 4)), ((8, 8), (4, 4)), ((5, 7), (2, 3))])
def test_every_whole_cell_has_the_dst_that_was_drawn_for_it(grid, stride):
    config = AgentConfig(agent_stride=stride, seed=5, ratio=0.3)
    plan = plan_layer(config, Phase.AGENT, grid)
    splits = draw_splits(plan, config, 741.0, 3)
    for layer, split in enumerate(splits):
        expected, cell = [], 0
        for y in range(0, grid[0] - stride[0] + 1, stride[0]):
            for x in range(0, grid[1] - stride[1] + 1, stride[1]):
                row, column = divmod(naive_draw(5, 741.0, layer, cell, stride[0] * stride[1]), stride[1])
                expected.append((y + row) * grid[1] + x + column)
                cell += 1
        assert split.dst_index.tolist() == expected
        assert split.src_index.tolist() == [i for i in range(grid[0] * grid[1]) if i not in expected]


def test_without_draws_every_layer_has_the_upper_left_token_of_each_cell():
    config = AgentConfig(use_rand=False)
    plan = plan_layer(config, Phase.MERGE, (4, 6))
    splits = draw_splits(plan, config, 100.0, 2)
    assert [split.dst_index.tolist() for split in splits] == [[0, 2, 4, 12, 14, 16]] * 2


def test_samples_of_one_timestep_have_one_draw():
    config = AgentConfig(seed=1)
    plan = plan_layer(config, Phase.AGENT, (8, 8))
    (split,) = draw_splits(plan, config, (900.0, 700.0, 900.0), 1)
    (alone,) = draw_splits(plan, config, 900.0, 1)
    assert split.tokens.shape == (3, 64)
    assert torch.equal(split.tokens[0], alone.tokens) and torch.equal(split.tokens[2], alone.tokens)
    assert not torch.equal(split.tokens[1], alone.tokens)


# --- calls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"use_rand": False}, {"match_tile": 4}], ids=str)
@pytest.mark.parametrize("timestep", [900.0, (900.0, 700.0)], ids=["one timestep", "a timestep per sample"])
def test_a_layer_has_the_same_draws_whichever_other_layers_a_call_reaches(settings, timestep):
    config = AgentConfig(seed=3, **settings)
    plan = plan_layer(config, Phase.AGENT, (9, 16))
    splits = draw_splits(plan, config, timestep, 7)
    calls = layer_calls(plan, config, timestep, [5, 2], batch=2)
    assert len(splits) == 7 and len(calls) == 2
    for call, number in zip(calls, (5, 2)):
        assert torch.equal(call.split.tokens, splits[number].tokens)
        assert torch.equal(call.split.dst_by_tile, splits[number].dst_by_tile)
        metric = torch.randn(2, 144, 4)
        matching = call.match(metric)
        rows = merge_each(metric, matching, call.layout_for(matching))
        agents = call.layout.parts(rows)[1]
        alone = match_tokens(metric, splits[number])
        assert torch.equal(agents, merge_tokens(metric, alone, plan.num_merged_for_agents))


def test_a_layout_serves_a_batch_of_another_size():
    """A video's frames come as samples of their own."""
    config = AgentConfig()
    plan = plan_layer(config, Phase.AGENT, (8, 8))
    (call,) = layer_calls(plan, config, 900.0, 1, batch=2)
    metric = torch.randn(6, 64, 4)
    matching = call.match(metric)
    layout = call.layout_for(matching)
    tokens, agents = layout.parts(merge_each(metric, matching, layout))
    assert torch.equal(tokens, merge_tokens(metric, call.match(metric), plan.num_merged))
    assert torch.equal(agents, merge_tokens(metric, call.match(metric), plan.num_merged_for_agents))


def test_calls_have_the_counts_of_their_plan_and_the_samples_they_are_for():
    config, samples = AgentConfig(ratio=0.3), torch.tensor([0, 2])
    for phase in Phase:
        plan = plan_layer(config, phase, (8, 8))
        for call in layer_calls(plan, config, 900.0, 2, batch=2, samples=samples):
            assert (call.action, call.num_merged) == (plan.action, plan.num_merged)
            assert call.num_merged_for_agents == plan.num_merged_for_agents and call.samples is samples
