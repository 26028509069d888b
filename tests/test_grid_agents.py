"""agents="grid": against naive loops, by its limits, and by what it costs."""

from __future__ import annotations

import pytest
import reference
import torch
from conftest import call_unet, make_unet
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import agentsd
from agentsd import AgentConfig, Phase
from agentsd.layer_plan import draw_splits, plan_layer, token_grid
from agentsd.patch import get_patch
from agentsd.report import as_text


def patched_layers(unet):
    """Name -> (attention, downsampling of the latent) of the patched layers, in the order of their numbers."""
    return {layer.name: (layer.attn, layer.downsample) for layer in get_patch(unet).layers}


def record(unet, name):
    """What the attention of a name is given and returns, once the UNet was called."""
    found = {}
    attn = unet.get_submodule(name)
    attn.register_forward_pre_hook(lambda m, args: found.__setitem__("tokens", args[0].detach()))
    attn.register_forward_hook(lambda m, args, out: found.__setitem__("output", out.detach()))
    return found


@pytest.mark.parametrize("use_rand", [True, False])
@pytest.mark.parametrize(
    "kind, size, settings",
    [
        ("sd15", (8, 8), {}),
        ("sd15", (10, 7), {"ratio": 0.5}),
        ("sd15", (9, 11), {"agent_stride": (3, 2), "alpha": 0.3, "broadcast_exponent": -0.4}),
        ("sd15", (16, 8), {"max_agents": 2, "match_tile": 4}),
        ("sd2", (8, 10), {"alpha": 0.0}),
        ("sdxl", (17, 13), {}),  # its attention sees 9 × 7 tokens
    ],
)
def test_equals_naive_loops(kind, size, settings, use_rand):
    unet = make_unet(kind)
    config = AgentConfig(agents="grid", use_rand=use_rand, seed=5, **settings)
    agentsd.apply_patch(unet, config)
    layers = patched_layers(unet)
    seen = {name: record(unet, name) for name in layers}
    call_unet(unet, timestep=900, size=size)
    for number, (name, (attn, downsample)) in enumerate(layers.items()):
        plan = plan_layer(config, Phase.AGENT, token_grid(*size, downsample))
        dsts = draw_splits(plan, config, 900.0, len(layers))[number].dst_index
        assert len(dsts) == plan.num_agents < plan.num_tokens == plan.num_keys == plan.num_left
        expected = reference.grid_agents_layer(
            attn, seen[name]["tokens"], dsts, config.alpha, config.broadcast_exponent
        )
        assert expected.std() > 0.01  # not a comparison of zeros
        torch.testing.assert_close(seen[name]["output"], expected.float(), atol=1e-4, rtol=1e-4)


def test_limits_hold():
    unet = make_unet()
    before = call_unet(unet)
    outputs = {}
    for agents in ("merge", "grid"):
        for ratio in (0.0, 0.4):
            with agentsd.patched(unet, agents=agents, ratio=ratio):
                outputs[agents, ratio, "early"] = call_unet(unet, timestep=900)
                outputs[agents, ratio, "later"] = call_unet(unet, timestep=100)
            with agentsd.patched(unet, agents=agents, ratio=ratio, early=0.0):
                outputs[agents, ratio, "no agents"] = call_unet(unet, timestep=900)
    # Nothing is merged beside agents from a grid, and later steps do not know where agents come from.
    assert torch.equal(outputs["grid", 0.4, "early"], outputs["grid", 0.0, "early"])
    for ratio in (0.0, 0.4):
        assert not torch.allclose(outputs["grid", ratio, "early"], outputs["merge", ratio, "early"], atol=1e-4)
        for when in ("later", "no agents"):
            assert torch.equal(outputs["grid", ratio, when], outputs["merge", ratio, when])
    assert torch.equal(outputs["grid", 0.0, "no agents"], before)
    assert torch.equal(call_unet(unet), before)


def test_a_ratio_that_no_cell_of_the_agents_allows_is_none_of_its_concern():
    agentsd.AgentConfig(agents="grid", agent_stride=(1, 2), merge_stride=4, ratio=0.9)


def test_each_sample_has_its_own_agents_where_timesteps_differ():
    unet = agentsd.apply_patch(make_unet(), agents="grid")
    samples = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    together = call_unet(unet, samples, timestep=torch.tensor([950, 100, 700]))
    text = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))  # as call_unet makes it
    with torch.no_grad():
        alone = [unet(samples[i : i + 1], t, text[i : i + 1]).sample for i, t in enumerate((950, 100, 700))]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_upcast_survives_logits_beyond_float16():
    unet = make_unet("sd2")
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".attn1.to_q." in name or ".attn1.to_k." in name:
                parameter.mul_(400)
    unet = agentsd.apply_patch(unet.half(), agents="grid")
    assert torch.isfinite(call_unet(unet, timestep=900)).all()


def test_it_compiles_whole(fresh_dynamo):
    small = dict(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
    unet = agentsd.apply_patch(make_unet(**small, mid_block_type=None), agents="grid")
    eager = [call_unet(unet, timestep=torch.tensor(t), size=size) for size in ((16, 16), (24, 16)) for t in (900, 800)]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    unet.compile(fullgraph=True, backend=backend)
    compiled = [
        call_unet(unet, timestep=torch.tensor(t), size=size) for size in ((16, 16), (24, 16)) for t in (900, 800)
    ]
    for one, other in zip(compiled, eager):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert len(graphs) <= 2


def test_describe_counts_what_is_computed():
    """Multiply–adds of the products of one layer, as PyTorch counts them, and α-mixing's."""
    unet = agentsd.apply_patch(make_unet(), agents="grid", ratio=0.3)
    report = agentsd.describe(unet, 128, 128)
    name = report.active[0].name
    cost = report.active[0].phases["agent"]
    assert (cost.tokens_left, cost.keys, cost.agents) == (256, 256, 16)
    counter = FlopCounterMode(display=False, depth=None)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused kernel
        call_unet(unet, timestep=900, batch=1)
    counted = sum(counter.get_flop_counts()[f"UNet2DConditionModel.{name}"].values()) // 2
    assert cost.multiply_adds == counted + 256 * 32
    assert "agent attention (one token of each cell) at timesteps ≥ 600" in as_text(report, 500)


def test_its_agent_maps_show_the_drawn_tokens():
    from agentsd.images.request import Request
    from agentsd.visualize import look_inside

    pipe = agentsd.load_pipeline("demo")
    request = Request("a red circle", steps=3)
    _, view = look_inside(pipe, request, AgentConfig(agents="grid"))
    side = view.grid[0]
    assert view.position.tolist() == list(range(side * side))
    cells = {(token // side // 4, token % side // 4) for token in view.agent_tokens.tolist()}
    assert len(cells) == len(view.agent_tokens) == (side // 4) ** 2 == view.agent_attention.shape[0]
    torch.testing.assert_close(view.agent_attention.float().sum(1), torch.ones(len(cells)), atol=0.02, rtol=0)
