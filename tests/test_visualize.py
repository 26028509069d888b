"""visualize.py: the maps show what the layer did."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_pipeline
from PIL import Image

import agentsd
from agentsd import AgentConfig, Phase, visualize
from agentsd.images.request import Request
from agentsd.patch import get_patch
from agentsd.visualize import MOST_VIEWS, agent_at, agent_map, agents_sheet, look_inside, look_through, merge_map

REQUEST = Request("a zebra", steps=5)


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


def test_agent_phase(pipe):
    image, view = look_inside(pipe, REQUEST, AgentConfig(ratio=0.4), layer=1, call=1)
    assert get_patch(pipe) is None  # nothing left behind
    assert view.phase is Phase.AGENT and view.timestep >= 600 and view.grid == (16, 16)
    assert view.agent_attention.shape == (16, 256)
    torch.testing.assert_close(view.agent_attention.float().sum(1), torch.ones(16), atol=2**-8, rtol=0)
    assert view.position.unique().numel() == 256 - int(256 * 0.4)
    # each agent of a full merge stands in a cell of its own
    cells = (view.agent_tokens // 16 // 4) * 4 + view.agent_tokens % 16 // 4
    assert sorted(cells.tolist()) == list(range(16))
    # members of one group get the same weight
    for group in view.position.unique():
        members = view.agent_attention[:, view.position == group]
        torch.testing.assert_close(members, members[:, :1].expand_as(members))

    overlay = merge_map(view, image)
    assert overlay.size == image.size
    pixels = np.asarray(overlay)[4::8, 4::8].reshape(256, 3)  # one pixel in the middle of each token
    sizes = torch.bincount(view.position)
    for group in (sizes > 1).nonzero()[:, 0]:
        hues = {
            Image.fromarray(p[None, None]).convert("HSV").getpixel((0, 0))[0] // 12
            for p in pixels[view.position == group]
        }
        assert len(hues) <= 4  # about one colour a group: the picture below shines through
    heat = agent_map(view, 3, image)
    assert heat.size == image.size and len(set(heat.getdata())) > 20
    sheet = agents_sheet(view, image, count=9)
    assert sheet.width > 3 * 190 and sheet.height > 3 * 190


def test_one_hot_token_does_not_hide_the_others(pipe):
    image, view = look_inside(pipe, REQUEST, AgentConfig(ratio=0.3), call=0)
    for rest in (1e-3, 0.0):
        weights = torch.full_like(view.agent_attention, rest)
        weights[:, :16] = 2 * rest  # the first row, a sixteenth of the tokens
        weights[:, 200] = 1.0
        shown = np.asarray(agent_map(replace(view, agent_attention=weights), 0, image.convert("L"))).astype(int)
        red, hot = shown[..., 0] - shown[..., 2], (slice(96, 104), slice(64, 72))  # token 200: row 12, column 8
        assert red[hot].mean() > 30
        assert red[:8, 16:-16].mean() > 30 if rest else red[:8].mean() < 0


def test_merge_phase_has_a_merge_map_and_no_agents(pipe):
    image, view = look_inside(pipe, REQUEST, AgentConfig(ratio=0.3), call=5)
    assert view.phase is Phase.MERGE and view.agent_attention is None
    assert merge_map(view, image).size == image.size
    for show in (lambda: agent_map(view, 0, image), lambda: agents_sheet(view, image)):
        with pytest.raises(ValueError, match="no agents"):
            show()


def test_layer_by_name_and_not_every_agent_merged(pipe):
    names = [layer.name for layer in agentsd.describe(agentsd.apply_patch(pipe)).active]
    agentsd.remove_patch(pipe)
    image, view = look_inside(pipe, REQUEST, AgentConfig(agent_ratio=0.7), layer=names[2])
    assert view.layer == names[2]
    assert len(view.agent_tokens) == 256 - 179 == len(view.agent_tokens.unique())
    assert agents_sheet(view, image, 7).size[0] > 0


def test_a_patch_that_stood_there_is_back(pipe):
    agentsd.apply_patch(pipe, ratio=0.2)
    look_inside(pipe, REQUEST, AgentConfig(ratio=0.4))
    assert get_patch(pipe).config.ratio == 0.2
    agentsd.remove_patch(pipe)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layer": 17}, "layer=17.*0: down_blocks"),
        ({"layer": "mid"}, "layer='mid'"),
        ({"call": 99}, "call=99: this run had 6 UNet calls; choose 0 … 5"),
        ({"call": 5, "config": AgentConfig(ratio=0.0)}, "merges nothing"),
    ],
)
def test_errors(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        look_inside(pipe, REQUEST, **arguments)
    assert get_patch(pipe) is None


def test_agent_out_of_range(pipe):
    image, view = look_inside(pipe, REQUEST)
    with pytest.raises(ValueError, match="agent=16: must lie in 0 … 15"):
        agent_map(view, 16, image)


def test_a_whole_run_is_what_each_call_shows(pipe):
    config = AgentConfig(ratio=0.4, early=0.4)
    image, views = look_through(pipe, REQUEST, config, layer=1)
    assert [view.call for view in views] == [0, 1, 2, 3, 4, 5]
    for call in (1, 4):
        alone, view = look_inside(pipe, REQUEST, config, layer=1, call=call)
        assert np.array_equal(np.asarray(alone), np.asarray(image))
        assert torch.equal(view.position, views[call].position) and view.timestep == views[call].timestep
    # calls that merge nothing have nothing to show
    _, views = look_through(pipe, REQUEST, AgentConfig(ratio=0.0), layer=1)
    assert views and {view.phase for view in views} == {Phase.AGENT}
    with pytest.raises(ValueError, match="merges nothing in any of the 6 UNet calls"):
        look_through(pipe, REQUEST, AgentConfig(ratio=0.0, early=0.0))
    assert get_patch(pipe) is None


def test_the_agent_at_a_place(pipe):
    _, view = look_inside(pipe, REQUEST)
    height, width = view.grid
    for x, y in [(0.01, 0.01), (0.99, 0.01), (0.4, 0.8)]:
        places = [(int(token) // width + 0.5, int(token) % width + 0.5) for token in view.agent_tokens]
        distances = [(row - y * height) ** 2 + (column - x * width) ** 2 for row, column in places]
        assert agent_at(view, x, y) == distances.index(min(distances))
    with pytest.raises(ValueError, match="no agents"):
        agent_at(look_inside(pipe, REQUEST, call=5)[1], 0.5, 0.5)


# --- what a recording may take ----------------------------------------------------------------------------------------


def test_a_long_run_is_recorded_at_evenly_spaced_calls(pipe):
    _, views = look_through(pipe, replace(REQUEST, steps=40), AgentConfig(early=1.0))
    calls = [view.call for view in views]
    assert len(calls) == MOST_VIEWS and (calls[0], calls[-1]) == (0, 40)  # PLMS calls the UNet once more than steps
    assert set(np.diff(calls)) == {1, 2}
    assert views[12].timestep == look_inside(pipe, replace(REQUEST, steps=40), call=calls[12])[1].timestep
    _, views = look_through(pipe, replace(REQUEST, steps=MOST_VIEWS - 1))
    assert [view.call for view in views] == list(range(MOST_VIEWS))


@pytest.mark.parametrize(
    "config, num_agents",
    [
        (AgentConfig(), 16),
        (AgentConfig(early=1.0), 16),
        (AgentConfig(agent_ratio=0.0), 256),
        (AgentConfig(agent_ratio=0.7), 77),
        (AgentConfig(agent_stride=(2, 4)), 32),
        (AgentConfig(max_agents=5), 5),
        (AgentConfig(agent_ratio=0.0, max_agents=9), 9),
    ],
)
def test_a_recording_beyond_its_budget_is_refused_before_anything_is_recorded(pipe, config, num_agents):
    num_calls = 6 if config.early == 1 else 3  # with agents, of PLMS
    needed = num_calls * num_agents * 256 * 2
    _, views = look_through(pipe, REQUEST, config, budget=needed)
    with_agents = [view for view in views if view.phase is Phase.AGENT]
    assert needed == sum(view.agent_attention.numel() * view.agent_attention.element_size() for view in with_agents)
    assert views[0].num_bytes == num_agents * 256 * 2 + num_agents * 8 + 256 * 8
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    told = f"{num_agents} agents × 256 tokens in {len(with_agents)} UNet calls would take .* a larger agent_ratio"
    with pytest.raises(ValueError, match=told):
        look_through(pipe, REQUEST, config, budget=needed - 1)
    handle.remove()
    assert len(calls) == 1 and get_patch(pipe) is None

    one = num_agents * 256 * 2
    assert look_inside(pipe, REQUEST, config, call=1, budget=one)[1].agent_attention.shape == (num_agents, 256)
    with pytest.raises(ValueError, match="in 1 UNet calls would take"):
        look_inside(pipe, REQUEST, config, call=1, budget=one - 1)
    with pytest.raises(ValueError, match="call=99"):
        look_inside(pipe, REQUEST, config, call=99, budget=one)


def test_a_call_without_agents_needs_no_budget(pipe):
    assert look_inside(pipe, REQUEST, call=5, budget=0)[1].phase is Phase.MERGE


def test_the_weights_are_computed_in_blocks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    agents, key = (torch.randn(2, count, 8, generator=generator) for count in (30, 20))
    position = torch.cat([torch.arange(20), torch.randint(20, (12,), generator=generator)])
    expected = (agents @ key.mT * 8**-0.5).softmax(-1).mean(0) / position.bincount()
    sizes = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(visualize, "_LOGITS_PER_BLOCK", 2 * 20 * 7)
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: sizes.append(x.numel()) or softmax(x, dim=dim))
    weights = visualize._weights(agents, key, position)
    assert sizes == [2 * 20 * 7] * 4 + [2 * 20 * 2]
    torch.testing.assert_close(weights.float(), expected[:, position], rtol=2**-8, atol=0)


def test_what_is_kept_shows_what_was_computed(pipe):
    """Also where one token takes nearly all: the map's scale is that of the others, however small they are."""
    image, view = look_inside(pipe, REQUEST)
    logits = 2 * torch.randn(view.agent_attention.shape, generator=torch.Generator().manual_seed(0))
    for peak in (0.0, 25.0):
        logits[:, 200] = peak
        exact = logits.softmax(dim=-1)
        shown = [
            np.asarray(agent_map(replace(view, agent_attention=weights), 3, image)).astype(int)
            for weights in (exact, exact.to(view.agent_attention.dtype))
        ]
        assert shown[0].std() > 20 and np.abs(shown[0] - shown[1]).max() <= 8


def test_with_step_caching_calls_are_those_of_the_unet(pipe):
    """A cached call skips the first layers, which must not shift the numbers of the calls that follow."""
    config = AgentConfig(cache_interval=3, early=0.6)
    _, views = look_through(pipe, replace(REQUEST, steps=20), config, layer=0)
    whole = [view.call for view in views]
    assert views[0].num_calls == 21 and len(whole) < 21 and set(whole) > {0, 3}
    assert views[0].calls_with_agents == tuple(view.call for view in views if view.phase is Phase.AGENT)
    _, last = look_through(pipe, replace(REQUEST, steps=20), config, layer=2)
    assert [view.call for view in last] == list(range(21))  # the recomputed end
    assert [last[call].timestep for call in whole] == [view.timestep for view in views]
    with pytest.raises(ValueError, match="call=1: layer 0 merges nothing .* or step caching skips it"):
        look_inside(pipe, replace(REQUEST, steps=20), config, layer=0, call=1)


def test_where_agents_are_is_said_in_words(pipe):
    _, view = look_inside(pipe, REQUEST, call=5)
    with pytest.raises(
        ValueError, match="call=5: timestep 1 is in the merge phase.*; calls 0 … 2 have agents, of 0 … 5"
    ):
        agent_map(view, 0, Image.new("RGB", (8, 8)))
    assert replace(view, calls_with_agents=(0, 1, 2, 6)).where_agents_are == "calls 0 … 2, 6 have agents, of 0 … 5"
    assert (
        replace(view, calls_with_agents=()).where_agents_are
        == "none of the 6 calls of this run has agents; raise early"
    )
