"""report.py: the figures against ones counted by hand or by PyTorch, and a status that tells the truth."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec

import diffusers
import pytest
import torch
from conftest import call_unet, make_pipeline, make_unet
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import agentsd
from agentsd import Phase
from agentsd.patch import get_patch
from agentsd.report import as_text, every_layer


def sd15_unet():
    """Stable Diffusion 1.5's own architecture, without weights."""
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)


def test_sd15_at_512():
    report = agentsd.describe(agentsd.apply_patch(sd15_unet(), ratio=0.4))
    assert (report.height, report.width) == (512, 512)
    assert len(report.layers) == 16 and len(report.active) == 5
    for layer in report.active:
        assert layer.tokens == 4096
        assert layer.phases["agent"].agents == 256  # N / 16
        assert layer.phases["agent"].tokens_left == layer.phases["merge"].tokens_left == 4096 - 1638
        assert layer.phases["merge"].agents == 0
        assert layer.multiply_adds == 4 * 4096 * 320 * 320 + 2 * 4096 * 4096 * 320
        # matching + projections + aggregation and broadcast + mixing
        assert layer.phases["agent"].multiply_adds == (
            3840 * 256 * 320 + (4 * 2458 + 256) * 320 * 320 + 4 * 2458 * 256 * 320 + 2458 * 320
        )
    assert 350e9 < report.unet_multiply_adds < 450e9
    assert report.unet_fraction(Phase.AGENT) < report.unet_fraction(Phase.MERGE) < 1
    assert report.early_timestep == 600


def test_whole_unet_is_counted_as_pytorch_counts_it():
    for kind in ("sd15", "sdxl"):
        unet = make_unet(kind)
        # Explicit attention: torch 2.8 does not count its fused kernel for CPUs.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            sample = torch.randn(1, 4, 16, 24)
            text = torch.randn(1, 77, unet.config.cross_attention_dim)
            extra = {"text_embeds": torch.randn(1, 32), "time_ids": torch.randn(1, 6)} if kind == "sdxl" else None
            unet(sample, 1, text, added_cond_kwargs=extra)
        assert agentsd.describe(unet, 128, 192).unet_multiply_adds == counter.get_total_flops() // 2


@pytest.mark.parametrize(
    "kind, depth, recomputed",
    [
        ("sd15", "auto", ["up_blocks.1.attentions.1"]),
        ("sd15", 2, ["down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]),
        ("sdxl", 1, []),
    ],
)
def test_a_cached_call_is_counted_as_pytorch_counts_it(kind, depth, recomputed):
    unet = make_unet(kind)
    agentsd.apply_patch(unet, ratio=0, early=0, cache_interval=2, cache_depth=depth)
    report = agentsd.describe(unet, 128, 192)
    sample, text = torch.randn(1, 4, 16, 24), torch.randn(1, 77, unet.config.cross_attention_dim)
    extra = {"text_embeds": torch.randn(1, 32), "time_ids": torch.randn(1, 6)} if kind == "sdxl" else None
    counted = []
    for timestep in (500, 480):
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            unet(sample, timestep, text, added_cond_kwargs=extra)
        counted.append(counter.get_total_flops() // 2)
    assert get_patch(unet).last_call.cached and [report.unet_multiply_adds, report.cached_multiply_adds] == counted
    # Agents save in the recomputed layers alone.
    agentsd.apply_patch(unet, cache_interval=2, cache_depth=depth)
    report = agentsd.describe(unet, 128, 192)
    found = [layer for layer in report.active if layer.recomputed]
    assert [layer.name.partition(".transformer_blocks")[0] for layer in found] == recomputed
    saved = sum(layer.multiply_adds - layer.phases["agent"].multiply_adds for layer in found)
    expected = (counted[1] - saved) / counted[0]
    assert report.unet_fraction(Phase.AGENT, cached=True) == pytest.approx(expected)
    assert f"in a cached call {expected:.1%}" in str(report)
    assert agentsd.describe(make_unet(kind)).cached_multiply_adds is None


def test_sd15_at_1024_with_what_keeps_the_cost_of_a_token_constant():
    config = agentsd.AgentConfig(max_agents=256, match_tile=16, late="downsample", merge_stride=4)
    report = agentsd.describe(agentsd.apply_patch(sd15_unet(), config), 1024, 1024)
    tokens = 128 * 128
    for layer in report.active:
        agent, late = layer.phases["agent"], layer.phases["merge"]
        left = tokens - int(tokens * 0.4)
        assert (agent.agents, agent.tokens_left, agent.keys) == (256, left, left)
        # A src is compared with the 4 dsts (one per 8 × 8 cell) of its own 16 × 16 tile.
        assert agent.multiply_adds == (
            (tokens - 256) * 4 * 320 + (4 * left + 256) * 320 * 320 + 4 * left * 256 * 320 + left * 320
        )
        assert (late.agents, late.tokens_left, late.keys) == (0, tokens, 1024)
        assert late.multiply_adds == 2 * (tokens + 1024) * 320 * 320 + 2 * tokens * 1024 * 320
    assert "agent attention at timesteps ≥ 600, downsampled keys and values below" in as_text(report, 500)


@pytest.mark.parametrize(
    "settings",
    [
        {"merge_stride": (2, 3)},
        {"late": "downsample", "max_agents": 5, "max_keys": 40, "match_tile": 8},
        {"late": "full"},
    ],
)
@pytest.mark.parametrize("size", [(128, 128), (136, 120), (160, 200)])
def test_token_counts_are_the_ones_that_run(size, settings):
    unet = make_unet()
    agentsd.apply_patch(unet, ratio=0.3, **settings)
    report = agentsd.describe(unet, *size)
    for phase, timestep in ((Phase.AGENT, 900), (Phase.MERGE, 100)):
        seen = {layer.name: [] for layer in report.active}
        handles = [
            unet.get_submodule(f"{layer.name}.{projection}").register_forward_hook(
                lambda m, a, out, tokens=seen[layer.name]: tokens.append(out.shape[:-1].numel() // 2)  # a batch of 2
            )
            for layer in report.active
            for projection in ("to_q", "to_k")
        ]
        call_unet(unet, timestep=timestep, size=(size[0] // 8, size[1] // 8))
        for handle in handles:
            handle.remove()
        for layer in report.active:
            cost = layer.phases[phase.value]
            queries = cost.tokens_left + cost.agents  # agents are projected like queries
            assert sorted(seen[layer.name]) == sorted([queries, cost.keys])


def sdxl_unet():
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(
            sample_size=128, cross_attention_dim=2048, attention_head_dim=[5, 10, 20],
            block_out_channels=(320, 640, 1280), use_linear_projection=True, transformer_layers_per_block=[1, 2, 10],
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip


def test_sdxl_fits_on_a_screen():
    report = agentsd.describe(agentsd.apply_patch(sdxl_unet()))
    lines = str(report).splitlines()
    assert len(lines) <= 22 and max(map(len, lines)) <= 100
    assert "10 layers, each 64×64 = 4096 tokens: down_blocks.1 (4), up_blocks.1 (6)" in lines
    assert "60 left alone: its level is downsampled 4×" in str(report)
    assert "down_blocks.2 (20), up_blocks.0" in str(report) and "mid_block (10)" in str(report)
    assert max(map(len, as_text(report, 40).splitlines())) <= 46  # of the table; words are wrapped at 40
    assert len(every_layer(report).splitlines()) == 70


def test_layers_that_attend_to_the_text_only_are_not_counted_as_self_attention():
    report = agentsd.describe(agentsd.apply_patch(make_unet("sd15-deep", only_cross_attention=(False, True, False))))
    assert report.layers and not all(layer.self_attention for layer in report.layers)
    counted = sum(layer.self_attention for layer in report.layers)
    told = f"{counted} self-attention layers; {len(report.layers) - counted} others are cross-attention only"
    assert told in as_text(report, 500)
    assert "others are cross-attention only" not in str(agentsd.describe(agentsd.apply_patch(make_unet())))


def test_a_prompt_and_a_notebook_show_the_table():
    report = agentsd.describe(agentsd.apply_patch(make_pipeline()))
    assert repr(report) == str(report)
    markup = report._repr_html_()
    assert "<td>agent</td>" in markup and "16×16 = 256 tokens" in markup and markup.count("<table>") == 1


def test_an_assumed_schedule_is_called_assumed():
    assert "a schedule of 1000 timesteps is assumed" in as_text(agentsd.describe(agentsd.apply_patch(make_unet())), 500)
    assert "assumed" not in str(agentsd.describe(agentsd.apply_patch(make_pipeline())))


def test_what_happened_in_the_last_call_is_told():
    pipe = agentsd.apply_patch(make_pipeline())
    assert "last call" not in str(agentsd.describe(pipe))
    call_unet(pipe.unet, timestep=981, size=(16, 24))
    assert "last call: 192×128 px, timestep 981, agent phase: active on 3 of 3 patched layers" in as_text(
        agentsd.describe(pipe), 500
    )
    attn = get_patch(pipe).layers[1].attn
    attn.forward = lambda hidden_states, **kwargs: hidden_states  # as T-GATE and others do
    with pytest.warns(UserWarning, match="bypassed"):
        call_unet(pipe.unet, timestep=981)
    report = agentsd.describe(pipe)
    text = as_text(report, 500)
    assert "active on 2 of 4 self-attention layers" in text and "active on 2 of 3 patched layers" in text
    assert len(report.active) == 2 and "1 not active in the last call: bypassed, its attention has the forward" in text
    assert json.loads(json.dumps(report.to_dict()))["last_call"]["phase"] == "agent"


def test_step_caching_is_told_with_its_calls():
    unet = agentsd.apply_patch(make_unet(), cache_interval=3)
    call_unet(unet, timestep=910)
    text = as_text(agentsd.describe(unet), 500)
    assert "1 whole and 0 cached calls (runs of fewer than 10 steps are not cached)\n" in text
    agentsd.new_run(unet)
    for timestep in (900, 890, 880, 870):
        call_unet(unet, timestep=timestep)
    text = as_text(agentsd.describe(unet), 500)
    assert "step caching: up to 3 calls in a row share one whole call" in text
    assert "agent phase: active on 3 of 3 patched layers; this run: 2 whole and 2 cached calls\n" in text
    call_unet(unet, timestep=860)
    assert "agent phase, cached: active on 3 of 3" in as_text(agentsd.describe(unet), 500)
    json.dumps(agentsd.describe(unet).to_dict())


def test_a_call_that_had_nothing_to_do_says_nothing_against_the_patch():
    unet = agentsd.apply_patch(make_unet(), late="full")
    call_unet(unet, timestep=1)
    report = agentsd.describe(unet)
    assert len(report.active) == 3 and "merge phase: active on 0 of 3 patched layers" in as_text(report, 500)
    with pytest.warns(UserWarning, match="smaller than a cell"):
        call_unet(unet, timestep=999, size=(2, 2))
    assert len(agentsd.describe(unet).active) == 3


def test_notes_of_the_last_call_and_a_scheduler_of_noise_levels():
    pipe = agentsd.apply_patch(make_pipeline())
    call_unet(pipe.unet)
    patch = get_patch(pipe)
    notes = {layer.name: "its attn2 knows places" for layer in patch.layers}
    patch.last_call = dataclasses.replace(patch.last_call, notes=notes)
    assert "on 3 layers: its attn2 knows places" in str(agentsd.describe(pipe))
    pipe.scheduler = diffusers.EDMEulerScheduler()
    report = agentsd.describe(pipe)
    assert report.early_timestep is None and "agent   " not in str(report)
    assert "token merging in every step, as the scheduler counts noise levels" in as_text(report, 500)


def test_unpatched_says_so():
    report = agentsd.describe(make_pipeline())
    assert report.config is None and not report.active
    assert {layer.status for layer in report.layers} == {"not patched"}
    assert "not patched" in str(report)
    json.dumps(report.to_dict())


def test_status_follows_the_processors():
    pipe = agentsd.apply_patch(make_pipeline())
    report = agentsd.describe(pipe)
    assert {layer.status.split(":")[0] for layer in report.layers} == {"active", "left alone"}
    pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor2_0())
    report = agentsd.describe(pipe)
    assert not report.active
    assert sum("replaced by AttnProcessor2_0" in layer.status for layer in report.layers) == 3
    agentsd.apply_patch(pipe)
    assert len(agentsd.describe(pipe).active) == 3


def test_small_grids_are_told():
    pipe = agentsd.apply_patch(make_pipeline())
    assert "smaller than a cell" in as_text(agentsd.describe(pipe, 8, 8), 500)


def test_readable_and_usable_as_data():
    pipe = agentsd.apply_patch(make_pipeline())
    report = agentsd.describe(pipe, 128, 192)
    text = as_text(report, 500)
    for expected in (
        "16×24 = 384",
        "agent",
        "merge",
        "Mmul-add",
        "max_downsample is 1",
        "ratio=0.4",
        "timesteps ≥ 600",
    ):
        assert expected in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["layers"][0]["tokens"] == 384 and set(data["unet_fraction"]) == {"agent", "merge"}
    for settings, says in (
        ({}, "token merging in every step"),
        ({"late": "downsample"}, "downsampled keys and values in every step"),
        ({"ratio": 0.0}, "but ratio=0 and early=0 change nothing"),
        ({"late": "full"}, "but late='full' and early=0 change nothing"),
    ):
        only_later = as_text(agentsd.describe(agentsd.apply_patch(pipe, early=0.0, **settings)), 500)
        assert "agent phase" not in only_later and says in only_later
    half = agentsd.describe(agentsd.apply_patch(pipe, late="full"))
    assert "agent attention at timesteps ≥ 600, unpatched below" in as_text(half, 500)
    assert half.unet_fraction(Phase.AGENT) < half.unet_fraction(Phase.MERGE) == 1


@pytest.mark.parametrize(
    "inputs, counted",
    [
        ({"class_embed_type": "projection", "projection_class_embeddings_input_dim": 24}, True),  # SD 2.1 unCLIP
        ({"class_embed_type": "timestep"}, True),
        ({"num_class_embeds": 10}, True),  # the x4 upscaler
        ({"addition_embed_type": "image", "encoder_hid_dim": 8}, False),  # Kandinsky
    ],
)
def test_unets_with_inputs_of_their_own_are_described(inputs, counted):
    report = agentsd.describe(agentsd.apply_patch(make_unet(**inputs)))
    assert len(report.active) == 3 and (report.unet_multiply_adds is not None) is counted
    assert ("whole UNet" in str(report)) is counted and "self-attention" in str(report)
    json.dumps(report.to_dict())


def test_describing_disturbs_nothing():
    unet = make_unet()
    agentsd.apply_patch(unet)
    before = call_unet(unet)
    state = torch.get_rng_state()
    agentsd.describe(unet, 256, 256)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(call_unet(unet), before)


@pytest.mark.parametrize("size, error", [((130, 128), ValueError), ((0, 128), ValueError), (("a", 128), TypeError)])
def test_bad_sizes(size, error):
    with pytest.raises(error, match="height="):
        agentsd.describe(make_unet(), *size)


def test_describe_stays_a_function_whatever_was_imported_before():
    """A module of the same name would take its place once something imports it, as the command does."""
    names = set(agentsd.__all__) - {"__version__"}
    assert "describe" in names and not [name for name in names if find_spec(f"agentsd.{name}") is not None]
