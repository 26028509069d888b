"""The ComfyUI node in ComfyUI's own classes (comfyui_worker.py), against our path on diffusers."""

from __future__ import annotations

import pytest
import torch
from comfyui_support import comfyui  # noqa: F401
from conftest import make_unet

import agentsd
from agentsd.config import FIELD_NAMES, PRESETS, AgentConfig

KINDS = ("sd15", "sd2", "sdxl")
# AgentSD's settings, as apply_patch and as the node take them.
SETTINGS = {
    "paper": {},
    "agents only": dict(ratio=0.0, early=1.0),
    "merging only": dict(early=0.0, ratio=0.5),
    "all levels": dict(max_downsample=2, ratio=0.7, seed=3),
    "downsampled keys": dict(late="downsample", early=0.5, max_keys=10),
    "full later": dict(late="full", ratio=0.9, early=0.37),
    "capped": dict(max_agents=4, match_tile=8, early=1.0),
    "agents from a grid": dict(agents="grid", early=1.0, ratio=0.5),
}


@pytest.fixture(scope="module")
def unets(comfyui):  # noqa: F811
    """Tiny diffusers UNets; the worker has ComfyUI models of the same weights."""
    unets = {kind: make_unet(kind, norm_num_groups=32) for kind in KINDS}
    for kind, unet in unets.items():
        comfyui("make", name=kind, kind=kind, weights=unet.state_dict())
    comfyui("make", name="sd15-v", kind="sd15", weights=unets["sd15"].state_dict(), prediction="v")
    return unets


def inputs(unet, size=(16, 16), batch=2):
    """(latent, text, extra inputs for diffusers, y for ComfyUI)."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(batch, 4, *size, generator=generator)
    text = torch.randn(batch, 7, unet.config.cross_attention_dim, generator=generator)
    if unet.config.addition_embed_type is None:
        return latent, text, {}, None
    pooled, sizes = torch.randn(batch, 32, generator=generator), torch.rand(batch, 6, generator=generator) * 10
    embedded = unet.add_time_proj(sizes.flatten()).reshape(batch, -1)
    y = torch.cat([pooled, embedded], dim=-1)
    return latent, text, {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}, y


def for_node(settings):
    """A caps widget says 0 for no limit, max_downsample is a text."""
    return {**settings, "max_downsample": str(settings.get("max_downsample", "auto"))}


def node(**settings):
    return [("AgentSD", for_node(settings))]


def call_both(comfyui, unets, kind, settings, size=(16, 16), timestep=900):  # noqa: F811
    """The worker's answer, our output on diffusers and the unpatched one there, for the same input."""
    unet = unets[kind]
    latent, text, extra, y = inputs(unet, size)
    arguments = dict(latent=latent, timestep=timestep, text=text, y=y)
    got = comfyui("call", model=kind, nodes=node(**settings), **arguments)
    timesteps = torch.tensor(timestep)
    with torch.no_grad():
        unpatched = unet(got["sample"], timesteps, text, **extra).sample
        with agentsd.patched(unet, **settings):
            return got, unet(got["sample"], timesteps, text, **extra).sample, unpatched


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_equals_diffusers(comfyui, unets, kind, settings):  # noqa: F811
    for size, timestep in (((16, 16), 900), ((16, 16), 120), ((13, 22), 631), ((10, 12), 500)):
        got, expected, unpatched = call_both(comfyui, unets, kind, settings, size, timestep)
        assert (got["out"] - expected).abs().max() <= 5e-5 * expected.std(), (size, timestep)
        if got["active"]:
            assert (unpatched - expected).abs().max() > 1e-3 * expected.std()
        assert not got["hooks"] and not got["random"] and not got["told"]


def test_phases_follow_the_timestep_as_on_diffusers(comfyui, unets):  # noqa: F811
    for timestep, action in ((599, "merge"), (600, "agents")):
        got, expected, _ = call_both(comfyui, unets, "sd15", {}, timestep=timestep)
        assert got["actions"] == [action]
        assert (got["out"] - expected).abs().max() <= 5e-5 * expected.std()


def test_a_timestep_for_each_sample(comfyui, unets):  # noqa: F811
    got, expected, _ = call_both(comfyui, unets, "sd15", {}, timestep=[900, 640])
    assert (got["out"] - expected).abs().max() <= 5e-5 * expected.std()
    mixed, _, unpatched = call_both(comfyui, unets, "sd15", {}, timestep=[900, 100])
    assert (mixed["out"] - unpatched).abs().max() <= 5e-5 * unpatched.std()
    assert len(mixed["told"]) == 1 and "both phases" in mixed["told"][0]


def test_controlnets_residuals(comfyui, unets):  # noqa: F811
    unet, generator = unets["sd15"], torch.Generator().manual_seed(9)
    latent, text, _, _ = inputs(unet)
    shapes = [(32, 16, 16), (32, 16, 16), (32, 8, 8), (64, 8, 8)]
    down = [torch.randn(2, *shape, generator=generator) for shape in shapes]
    middle = torch.randn(2, 64, 8, 8, generator=generator)
    control = {"output": list(down), "middle": [middle]}
    got = comfyui("call", model="sd15", nodes=node(), latent=latent, timestep=900, text=text, control=control)
    with torch.no_grad(), agentsd.patched(unet):
        residuals = dict(down_block_additional_residuals=down, mid_block_additional_residual=middle)
        expected = unet(got["sample"], 900, text, **residuals).sample
    assert (got["out"] - expected).abs().max() <= 5e-5 * expected.std()


def test_needs_no_diffusers(comfyui):  # noqa: F811
    loaded = comfyui("loaded_packages")  # the worker blocks its import
    assert "diffusers" not in loaded and "tomesd" not in loaded and "agentsd" in loaded


def test_widgets_have_the_defaults_and_ranges_of_the_settings(comfyui):  # noqa: F811
    widgets = comfyui("widgets")
    own = {"model", "preset", "start_percent", "end_percent"}
    assert set(widgets) - own <= set(FIELD_NAMES)
    assert all(options["tooltip"] for _, options in widgets.values())
    for name, (kind, options) in widgets.items():
        if name in own:
            continue
        default = PRESETS["fast"][name] if name == "cache_interval" else getattr(AgentConfig(), name)
        if name == "early_ratio":
            assert default is None and options["default"] == options["min"] == -1  # takes ratio
            continue
        cap = name in ("max_agents", "max_keys", "match_tile")
        assert options["default"] == (0 if cap else str(default) if isinstance(kind, list) else default)
        if isinstance(kind, list):
            allowed = [int(choice) if choice.isdigit() else choice for choice in kind]
        elif cap:
            allowed = [options["max"]]  # the least is 0, no limit
        else:
            allowed = [options["min"], options["max"]]
            step = options.get("step", 1)
            if name == "cache_interval":  # the node itself refuses more than 10
                assert allowed == [1, 10]
                step = 50
            for beyond in (options["min"] - step, options["max"] + step):
                with pytest.raises(ValueError, match=name):
                    AgentConfig(**{"late": "full", name: beyond})
        for value in allowed:
            AgentConfig(**{"late": "full", name: value})
    assert widgets["seed"][1]["control_after_generate"] is False


OLD = dict(ratio=0.3, early=0.2, late="merge", max_downsample="auto", seed=4, max_agents=0, max_keys=0, match_tile=0)
"""What workflows of the first version say of a node."""


def test_both_forms_of_nodes_through_comfyuis_own_loader_are_the_same(comfyui, unets):  # noqa: F811
    v3 = comfyui("loaded_by_comfyui", model="sd15", v3=True, values=OLD)
    v1 = comfyui("loaded_by_comfyui", model="sd15", v3=False, values=OLD)
    assert v3.pop("v3") == [True, True] and v1.pop("v3") == [False, False]
    assert v3 == v1
    assert v3["shows"] == [False, True] and v3["outputs"] == {"AgentSD": ["MODEL"], "AgentSDReport": ["STRING"]}
    assert v3["inputs"]["AgentSD"]["agents"][2]["advanced"] and v3["titles"] == ["AgentSD", "AgentSD report"]
    ((text,),), shown = v3["report"]
    assert shown == {"text": [text]} and "no run yet" in text
    assert v3["settings"]["cache_interval"] == 1 and v3["settings"]["seed"] == 4  # as they were


def test_a_new_node_is_what_the_preset_fast_is(comfyui, unets):  # noqa: F811
    values = {name: options["default"] for name, (_, options) in comfyui("widgets").items() if name != "model"}
    assert values["preset"] == "custom"  # so that every widget counts
    assert AgentConfig(**comfyui("patched_with", model="sd15", values=values)) == AgentConfig(**PRESETS["fast"])


# -- sampling --------------------------------------------------------------------------------------------------------


def test_phases_under_every_sampler_that_comfyui_lists(comfyui, unets):  # noqa: F811
    samplers = comfyui("samplers")
    assert {"euler", "heun", "dpm_2", "lms", "dpmpp_2m", "dpmpp_sde", "ddim", "uni_pc", "lcm"} <= set(samplers)
    for sampler in samplers:
        if sampler == "dpm_adaptive":  # it is unpatched: test_comfyui_caching.py
            continue
        run = comfyui("sample", model="sd15", nodes=node(), sampler=sampler, steps=7, size=(8, 8), cfg=1.0)
        agent = sum(sigma >= run["boundary"] for sigma, _ in run["calls"])
        assert run["phases"] == {"agent": agent, "merge": len(run["calls"]) - agent}, sampler
        assert 0 < agent < len(run["calls"]), sampler
        assert torch.isfinite(run["latents"]).all(), sampler
        assert not run["told"] and not run["hooks"], sampler
        if sampler == "euler":  # every call at a timestep of its own: the rule of diffusers, in timesteps
            assert agent == sum(timestep >= 600 for timestep in run["timesteps"])


def test_phases_with_v_prediction_and_with_edm_sampling(comfyui, unets):  # noqa: F811
    v = comfyui("sample", model="sd15-v", nodes=node(), steps=7)
    assert v["phases"] == {
        "agent": sum(t >= 600 for t in v["timesteps"]),
        "merge": sum(t < 600 for t in v["timesteps"]),
    }
    # EDM's noise levels are not timesteps: the early part of the run is told by sigma.
    edm = comfyui("sample", model="sd15", nodes=[("EDM", {}), *node(early=0.3)], steps=10, scheduler="exponential")
    agent = sum(sigma >= edm["boundary"] for sigma, _ in edm["calls"])
    assert edm["phases"] == {"agent": agent, "merge": len(edm["calls"]) - agent} and agent in (3, 4)
    plain = comfyui("sample", model="sd15", nodes=[("EDM", {})], steps=10, scheduler="exponential")
    assert (plain["latents"] - edm["latents"]).abs().max() > 1e-3


def test_nothing_changes_with_ratio_0_and_early_0(comfyui, unets):  # noqa: F811
    plain = comfyui("sample", model="sd15", nodes=[])
    zero = comfyui("sample", model="sd15", nodes=node(ratio=0.0, early=0.0))
    patched = comfyui("sample", model="sd15", nodes=node())
    assert torch.equal(plain["latents"], zero["latents"])
    assert (plain["latents"] - patched["latents"]).abs().max() > 1e-3
    assert "no layer was patched" in zero["report"]


def test_undone_when_the_node_is_not_in_the_graph(comfyui, unets):  # noqa: F811
    before = comfyui("sample", model="sd15", nodes=[])
    comfyui("sample", model="sd15", nodes=node())
    assert comfyui("failing_call", model="sd15", nodes=node()) == []
    after = comfyui("sample", model="sd15", nodes=[])
    assert torch.equal(before["latents"], after["latents"]) and after["hooks"] == []


def test_a_second_node_replaces_the_first(comfyui, unets):  # noqa: F811
    series = comfyui("sample", model="sd15", nodes=[*node(ratio=0.2, seed=5), *node(ratio=0.6)])
    alone = comfyui("sample", model="sd15", nodes=node(ratio=0.6))
    assert torch.equal(series["latents"], alone["latents"])
    assert "ratio=0.6" in series["report"]


def test_runs_do_not_depend_on_what_ran_before(comfyui, unets):  # noqa: F811
    counts, equal = comfyui("two_runs", model="sd15", nodes=node())
    assert counts == [4, 6, 4] and equal


def test_a_sample_does_not_depend_on_its_batch(comfyui, unets):  # noqa: F811
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    both = comfyui("sample", model="sd15", nodes=node(), noise=noise)["latents"]
    for i in range(2):
        one = comfyui("sample", model="sd15", nodes=node(), noise=noise[i : i + 1])["latents"]
        assert (one[0] - both[i]).abs().max() <= 1e-3 * both.std()


def test_areas(comfyui, unets):  # noqa: F811
    """Conditionings on parts of the image are calls of other sizes, each on a grid of its own."""
    areas = [(16, 8, 0, 0), (16, 8, 0, 8)]
    plain = comfyui("sample", model="sd15", nodes=[], areas=areas)
    zero = comfyui("sample", model="sd15", nodes=node(ratio=0.0, early=0.0), areas=areas)
    patched = comfyui("sample", model="sd15", nodes=node(), areas=areas)
    assert torch.equal(plain["latents"], zero["latents"])
    assert (plain["latents"] - patched["latents"]).abs().max() > 1e-3
    assert {shape[-2:] for _, shape in patched["calls"]} == {(16, 16), (16, 8)}
    assert "16×16 = 256 tokens" in patched["report"] and "16×8 = 128 tokens" in patched["report"]
    assert not patched["told"]


def lora(unet, rank=4):
    """A LoRA on every self-attention projection as (ComfyUI's file, the same model with it merged in)."""
    generator = torch.Generator().manual_seed(5)
    file, merged = {}, {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    for name in merged:
        if ".attn1.to_" in name and name.endswith("weight"):
            out, channels = merged[name].shape
            up = torch.randn(out, rank, generator=generator) * 0.2
            down = torch.randn(rank, channels, generator=generator) * 0.2
            merged[name] += 0.8 * up @ down
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            file.update({f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down})
    return file, merged


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_through_comfyuis_loader(comfyui, unets, order):  # noqa: F811
    weights, merged = lora(unets["sd15"])
    loader = ("LoRA", {"weights": weights, "strength": 0.8})
    nodes = [loader, *node()] if order == "before" else [*node(), loader]
    with_lora = comfyui("sample", model="sd15", nodes=nodes)["latents"]
    without = comfyui("sample", model="sd15", nodes=node())["latents"]
    comfyui("make", name="merged", kind="sd15", weights=merged)
    expected = comfyui("sample", model="merged", nodes=node())["latents"]
    assert (with_lora - expected).abs().max() <= 1e-3 * expected.std()
    assert (with_lora - without).abs().max() > 1e-2 * expected.std()


# -- beside other nodes ----------------------------------------------------------------------------------------------


def test_other_attention_patches_see_whole_grids(comfyui, unets):  # noqa: F811
    for first in (True, False):
        others = [("attn2", {"seen": []}), ("attn1 sees", {"seen": []})]
        run = comfyui("sample", model="sd15", nodes=[*others, *node()] if first else [*node(), *others], steps=2)
        assert all(set(seen) <= {256, 64} and seen for seen in run["seen"])
        assert not run["told"]
        alone = comfyui("sample", model="sd15", nodes=node(), steps=2)
        assert torch.equal(run["latents"], alone["latents"])


@pytest.mark.parametrize("first", [True, False])
def test_hypertile(comfyui, unets, first):  # noqa: F811
    """Layers that HyperTile cuts into tiles run as HyperTile alone has them, with one warning."""
    tile = ("HyperTile", {"tile_size": 64})
    latent, text, *_ = inputs(unets["sd15"], (32, 64))
    arguments = dict(model="sd15", latent=latent, timestep=900, text=text)
    alone = comfyui("call", nodes=[tile], **arguments)["out"]
    both = comfyui("call", nodes=[tile, *node()] if first else [*node(), tile], **arguments)
    assert torch.equal(both["out"], alone)
    assert len(both["told"]) == 1 and "HyperTile" in both["told"][0]
    assert (comfyui("call", nodes=[], **arguments)["out"] - alone).abs().max() > 1e-3  # it does cut them


def test_tome(comfyui, unets):  # noqa: F811
    """Before our node it is an error; after it, one warning, and ToMe's own result."""
    tome = ("ToMe", {"ratio": 0.5})
    error = comfyui("error_of", model="sd15", nodes=[tome, *node()])
    assert error.startswith("ValueError: AgentSD: ") and "Remove TomePatchModel" in error
    latent, text, *_ = inputs(unets["sd15"])
    arguments = dict(model="sd15", latent=latent, timestep=900, text=text)
    both = comfyui("call", nodes=[*node(), tome], **arguments)
    assert torch.equal(both["out"], comfyui("call", nodes=[tome], **arguments)["out"])
    assert len(both["told"]) == 1 and "ToMe" in both["told"][0]


def test_works_on_sdxl_where_comfyuis_tome_does_nothing(comfyui, unets):  # noqa: F811
    latent, text, _, y = inputs(unets["sdxl"])
    arguments = dict(model="sdxl", latent=latent, timestep=300, text=text, y=y)
    plain, tome = (comfyui("call", nodes=nodes, **arguments)["out"] for nodes in ([], [("ToMe", {"ratio": 0.5})]))
    ours = comfyui("call", nodes=node(ratio=0.5), **arguments)
    assert torch.equal(tome, plain)
    assert (ours["out"] - plain).abs().max() > 1e-2 * plain.std() and len(ours["active"]) == 8


def test_follows_deep_shrink_to_its_smaller_grids(comfyui, unets):  # noqa: F811
    """That node makes the inner part of the UNet smaller; the layers there have grids of their own."""
    run = comfyui("sample", model="sd15", nodes=[("Deep Shrink", {}), *node(max_downsample=2)])
    assert "4×4 = 16 tokens" in run["report"] and not run["told"]
    plain = comfyui("sample", model="sd15", nodes=[("Deep Shrink", {})])
    zero = comfyui("sample", model="sd15", nodes=[("Deep Shrink", {}), *node(ratio=0.0, early=0.0)])
    assert torch.equal(zero["latents"], plain["latents"])
    assert (run["latents"] - plain["latents"]).abs().max() > 1e-3


@pytest.mark.parametrize("first", [True, False])
def test_a_compiled_model_runs_unpatched_and_says_so(comfyui, unets, first):  # noqa: F811
    nodes = [("compile", {}), *node()] if first else [*node(), ("compile", {})]
    latent, text, *_ = inputs(unets["sd15"])
    arguments = dict(model="sd15", latent=latent, timestep=900, text=text)
    got = comfyui("call", nodes=nodes, **arguments)
    assert torch.equal(got["out"], comfyui("call", nodes=[], **arguments)["out"])
    assert len(got["told"]) == 1 and "TorchCompileModel" in got["told"][0]


def test_keys_of_another_node_keep_their_layers(comfyui, unets):  # noqa: F811
    latent, text, *_ = inputs(unets["sd15"])
    arguments = dict(model="sd15", latent=latent, timestep=900, text=text)
    got = comfyui("call", nodes=[("other keys", {}), *node()], **arguments)
    assert torch.equal(got["out"], comfyui("call", nodes=[("other keys", {})], **arguments)["out"])
    assert len(got["told"]) == 1 and "other keys or values" in got["told"][0] and "and 2 more" in got["told"][0]


def test_a_replaced_attention_keeps_its_layer(comfyui, unets):  # noqa: F811
    replacement = ("attn1 replace", {"place": ("input", 1, 0)})
    latent, text, *_ = inputs(unets["sd15"])
    got = comfyui("call", model="sd15", nodes=[replacement, *node()], latent=latent, timestep=900, text=text)
    assert got["active"] == ["output_blocks.2.1.transformer_blocks.0", "output_blocks.3.1.transformer_blocks.0"]
    assert len(got["told"]) == 1 and "input_blocks.1.1.transformer_blocks.0" in got["told"][0]


def test_a_bypassed_block_leaves_nothing_to_the_next(comfyui, unets):  # noqa: F811
    """A block whose forward another extension replaced; the middle block that follows is not patched."""
    latent, text, *_ = inputs(unets["sd15"], (16, 16))
    name = "input_blocks.1.1.transformer_blocks.0"
    arguments = dict(model="sd15", latent=latent, timestep=900, text=text, bypassed=name)
    got = comfyui("call", nodes=node(ratio=0.7), **arguments)
    assert len(got["told"]) == 1 and name in got["told"][0] and "replaces its block's forward" in got["told"][0]
    assert got["active"] == ["output_blocks.2.1.transformer_blocks.0", "output_blocks.3.1.transformer_blocks.0"]
    zero = comfyui("call", nodes=node(ratio=0.0, early=0.0), **arguments)
    assert torch.equal(zero["out"], comfyui("call", nodes=[], **arguments)["out"])


def test_bad_input_is_one_clear_message(comfyui, unets):  # noqa: F811
    error = comfyui("error_of", model="sd15", nodes=node(ratio=0.9))
    assert error.startswith("ValueError: ratio=0.9: at most 0.75")
    assert "match_tile=1" in comfyui("error_of", model="sd15", nodes=node(match_tile=1))
    assert "MMDiT and no UNet" in comfyui("error_on_dit")
    assert "belongs to a video model" in comfyui("error_on_video_unet")


def test_report(comfyui, unets):  # noqa: F811
    run = comfyui("sample", model="sd15", nodes=node(ratio=0.5, max_agents=8), steps=5)
    agent, later = run["phases"]["agent"], run["phases"]["merge"]
    assert f"5 model calls, {agent} in the agent phase and {later} later; sizes: 128×128 px (5)" in run["report"]
    assert "settings: ratio=0.5, early=0.4, max_agents=8" in run["report"]
    assert "agent phase: 3 layers, 16×16 = 256 tokens: 128 queries, 128 keys, 8 agents" in run["report"]
    assert "merge phase: 3 layers, 16×16 = 256 tokens: 128 queries, 128 keys" in run["report"]
    assert "max_downsample is 1" in run["report"]
