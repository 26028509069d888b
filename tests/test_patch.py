"""patch.py: exact limits, phases, reproducibility, clean removal, and clear errors."""

from __future__ import annotations

import copy
import gc
import sys
import warnings
import weakref
from types import SimpleNamespace

import diffusers
import hypothesis.strategies as st
import pytest
import tomesd
import torch
from conftest import SD_BETAS, call_unet, draw, make_pipeline, make_text_encoder, make_tokenizer, make_unet, make_vae
from diffusers import DDIMScheduler, PNDMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from hypothesis import HealthCheck, given, settings

import agentsd
from agentsd import Phase
from agentsd.patch import get_patch
from agentsd.unet.layers import find_layers
from agentsd.unet.processor import AgentAttnProcessor

KINDS = ["sd15", "sd15-deep", "sd2", "sdxl"]


def record_phases(unet) -> list[Phase]:
    """The phase of every UNet call from now on, read when a patched layer runs."""
    phases = []
    patch = get_patch(unet)
    patch.layers[0].attn.register_forward_pre_hook(lambda *_: phases.append(patch.call.phase))
    return phases


# --- exact limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.3, 0.5])
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_early_zero_equals_tomesd(kind, ratio, size):
    unet = make_unet(kind)
    max_downsample = 2 if kind == "sdxl" else 1
    tomesd.apply_patch(unet, ratio=ratio, max_downsample=max_downsample, use_rand=False)
    expected = call_unet(unet, size=size)
    tomesd.remove_patch(unet)
    plain = call_unet(unet, size=size)
    agentsd.apply_patch(unet, ratio=ratio, early=0.0, use_rand=False)
    ours = call_unet(unet, size=size)
    assert (ours - expected).abs().max() < 1e-5
    assert (plain - expected).abs().max() > 1e-4  # the merging is there to be seen


@pytest.mark.parametrize("merge", [{"merge_crossattn": True}, {"merge_mlp": True}])
def test_merging_elsewhere_equals_tomesd(merge):
    unet = make_unet()
    tomesd.apply_patch(unet, ratio=0.4, use_rand=False, **merge)
    expected = call_unet(unet)
    tomesd.remove_patch(unet)
    agentsd.apply_patch(unet, ratio=0.4, early=0.0, use_rand=False)
    attention_only = call_unet(unet)
    agentsd.apply_patch(unet, ratio=0.4, early=0.0, use_rand=False, **merge)
    assert (call_unet(unet) - expected).abs().max() < 1e-5
    assert (attention_only - expected).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_asked_for_changes_nothing(kind):
    unet = make_unet(kind)
    before = call_unet(unet)
    agentsd.apply_patch(unet, ratio=0.0, early=0.0)
    assert torch.equal(call_unet(unet), before)


def test_full_attention_in_the_later_steps():
    """late="full": agents early, and after that what the unpatched model computes, bit for bit."""
    unet = make_unet()
    early, later = call_unet(unet, timestep=900), call_unet(unet, timestep=100)
    agentsd.apply_patch(unet, ratio=0.9, late="full", merge_crossattn=True, merge_mlp=True)
    full = call_unet(unet, timestep=900)
    assert torch.equal(call_unet(unet, timestep=100), later)
    agentsd.apply_patch(unet, ratio=0.9, early=1.0, merge_crossattn=True, merge_mlp=True)
    assert torch.equal(call_unet(unet, timestep=900), full) and not torch.equal(full, early)


@pytest.mark.parametrize("merge", [{}, {"merge_crossattn": True, "merge_mlp": True}])
@pytest.mark.parametrize("early_ratio", [0.0, 0.2, 0.9])
def test_a_ratio_of_its_own_for_the_agent_phase(early_ratio, merge):
    """Each phase is what it is with that ratio in both."""
    unet = make_unet()
    agentsd.apply_patch(unet, ratio=0.5, early_ratio=early_ratio, **merge)
    early, later = call_unet(unet, timestep=900), call_unet(unet, timestep=100)
    agentsd.apply_patch(unet, ratio=early_ratio, early=1.0, **merge)
    assert torch.equal(call_unet(unet, timestep=900), early)
    agentsd.apply_patch(unet, ratio=0.5, **merge)
    assert torch.equal(call_unet(unet, timestep=100), later)
    assert not torch.equal(call_unet(unet, timestep=900), early)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"early": 1.0, "merge_crossattn": True, "merge_mlp": True}])
def test_removal_is_bit_identical_and_leaves_no_trace(kind, settings):
    unet = make_unet(kind)
    processors = dict(unet.attn_processors)
    attributes = {name: set(module.__dict__) for name, module in unet.named_modules()}
    before = call_unet(unet)
    agentsd.apply_patch(unet, **settings)
    assert not torch.equal(call_unet(unet), before)
    agentsd.remove_patch(unet)
    assert torch.equal(call_unet(unet), before)
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())
    assert {name: set(module.__dict__) for name, module in unet.named_modules()} == attributes
    for module in unet.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert not module._forward_pre_hooks_with_kwargs
    agentsd.remove_patch(unet)  # harmless


def test_every_phase_and_setting_matters():
    unet = make_unet()
    outputs = {}
    for name, fields, timestep in [
        ("agent", {}, 900),
        ("merge", {}, 100),
        ("alpha", {"alpha": 0.3}, 900),
        ("scale", {"broadcast_exponent": -0.5}, 900),
        ("ratio", {"ratio": 0.2}, 900),
        ("agent_ratio", {"agent_ratio": 0.7}, 900),
        ("agent_stride", {"agent_stride": 8}, 900),
        ("seed", {"seed": 1}, 900),
        ("fixed", {"use_rand": False}, 900),
        ("early", {"early": 0.05}, 900),
    ]:
        agentsd.apply_patch(unet, **fields)
        outputs[name] = call_unet(unet, timestep=timestep)
    names = list(outputs)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert not torch.equal(outputs[one], outputs[other]), (one, other)
    assert all(torch.isfinite(out).all() for out in outputs.values())


# --- which layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, max_downsample, downsamples",
    [
        ("sd15", "auto", {1}),
        ("sd15-deep", "auto", {1}),
        ("sd15-deep", 2, {1, 2}),
        ("sd15-deep", 8, {1, 2, 4}),
        ("sdxl", "auto", {2}),
        ("sdxl", 1, set()),
    ],
)
def test_levels(kind, max_downsample, downsamples):
    unet = make_unet(kind)
    eligible, skipped = find_layers(unet, agentsd.AgentConfig(max_downsample=max_downsample))
    assert {layer.downsample for layer in eligible} == downsamples
    self_attention = {name.removesuffix(".processor") for name in unet.attn_processors if ".attn1." in name}
    assert {layer.name for layer in (*eligible, *skipped)} == self_attention
    assert all(layer.reason for layer in skipped)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (19, 13), (22, 18)])
def test_grids_are_the_ones_the_layers_see(kind, size):
    """Every patched layer really merges at odd latent sizes: a wrong grid would fall back with a warning."""
    unet = make_unet(kind)
    agentsd.apply_patch(unet, max_downsample=2, use_rand=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call_unet(unet, size=size)
    assert set(get_patch(unet).last_call.outcomes.values()) == {"active"}


def test_no_layer_found_warns_with_the_reason():
    with pytest.warns(UserWarning, match="max_downsample is 1"):
        agentsd.apply_patch(make_unet("sdxl"), max_downsample=1)
    plain = UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        norm_num_groups=8,
        layers_per_block=1,
    )
    with pytest.warns(UserWarning, match="no self-attention"):
        agentsd.apply_patch(plain)
    call = call_unet(make_unet())
    assert torch.isfinite(call).all()


def test_kandinsky_style_attention_is_left_alone():
    unet = make_unet(
        down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )
    with pytest.warns(UserWarning, match="BasicTransformerBlock"):
        agentsd.apply_patch(unet)


# --- phases -----------------------------------------------------------------------------------------------------------


def test_50_plms_steps_have_21_agent_calls_of_51():
    pipe = agentsd.apply_patch(make_pipeline())
    phases = record_phases(pipe.unet)
    draw(pipe, steps=50)
    assert phases == [Phase.AGENT] * 21 + [Phase.MERGE] * 30


SCHEDULERS = {
    "ddim": (DDIMScheduler, {}),
    "ddim-trailing": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "dpm++2m-karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": False}),
    "500-steps": (DDIMScheduler, {"num_train_timesteps": 500}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_phase_follows_the_timestep_under_any_scheduler(name):
    scheduler_class, options = SCHEDULERS[name]
    scheduler = scheduler_class(**{**SD_BETAS, **options})
    pipe = agentsd.apply_patch(make_pipeline(scheduler=scheduler))
    phases = record_phases(pipe.unet)
    timesteps = []
    pipe.unet.register_forward_pre_hook(lambda m, a, k: timesteps.append(float(a[1])), with_kwargs=True)
    draw(pipe, steps=10)
    threshold = 0.6 * scheduler.config.num_train_timesteps
    assert phases == [Phase.AGENT if t >= threshold else Phase.MERGE for t in timesteps]
    assert {Phase.AGENT, Phase.MERGE} == set(phases)
    assert phases == sorted(phases, key=lambda phase: phase is Phase.MERGE)  # early first, then late, no going back


def test_img2img_starts_where_its_strength_puts_it():
    pipe = make_pipeline(scheduler=DDIMScheduler(**SD_BETAS))
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    agentsd.apply_patch(pipe)
    picture = torch.rand(1, 3, 128, 128)
    phases = record_phases(pipe.unet)
    draw(pipe, steps=20, image=picture, strength=0.5)
    assert phases == [Phase.MERGE] * 10  # starts at t = 451, below the agents' 600
    phases.clear()
    draw(pipe, steps=20, image=picture, strength=0.8)
    assert phases == [Phase.AGENT] * 4 + [Phase.MERGE] * 12


def test_phase_needs_no_history():
    """A run that was interrupted leaves nothing behind that the next one could mistake."""
    pipe = agentsd.apply_patch(make_pipeline(scheduler=DDIMScheduler(**SD_BETAS)))
    expected = draw(pipe)

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step >= 1
        return kwargs

    draw(pipe, callback_on_step_end=stop)
    assert torch.equal(draw(pipe), expected)


def test_phase_of_batched_and_plain_timesteps():
    unet = make_unet()
    agentsd.apply_patch(unet)
    for timestep, phase in [
        (700, Phase.AGENT),
        (599.5, Phase.MERGE),
        (torch.tensor([700, 800]), Phase.AGENT),
        (torch.tensor([700, 100]), Phase.MERGE),
    ]:
        call_unet(unet, timestep=timestep)
        assert get_patch(unet).last_call.phase is phase


def test_sample_may_come_by_keyword():
    unet = make_unet()
    agentsd.apply_patch(unet)
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)
    with torch.no_grad():
        by_place = unet(sample, 900, text).sample
        by_name = unet(encoder_hidden_states=text, timestep=900, sample=sample).sample
    assert torch.equal(by_place, by_name)


def test_at_most_one_synchronisation_per_call():
    """Only the timestep is read on the host: one `item` per UNet call, whatever the number of layers."""
    unet = make_unet("sd15-deep")
    agentsd.apply_patch(unet, max_downsample=4)

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    for timestep in (torch.tensor(900), torch.tensor(100)):
        with Count() as count:
            call_unet(unet, timestep=timestep)
        assert count.reads == 1


# --- the same seed gives the same picture -----------------------------------------------------------------------------


def test_same_call_same_picture_and_global_rng_untouched():
    pipe = agentsd.apply_patch(make_pipeline())
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = draw(pipe)
    assert torch.equal(torch.get_rng_state(), state)
    draw(pipe, seed=7, steps=2)  # whatever ran before
    torch.rand(5)
    assert torch.equal(draw(pipe), first)
    agentsd.apply_patch(pipe, seed=1)
    assert not torch.equal(draw(pipe), first)


def test_guidance_in_one_call_or_two_draws_the_same_destinations():
    """A batch of one stays random, and matches its half of a batch of two."""
    unet = make_unet()
    agentsd.apply_patch(unet)
    sample, text = torch.randn(1, 4, 16, 16).expand(2, -1, -1, -1), torch.randn(2, 7, 32)
    with torch.no_grad():
        together = unet(sample, 900, text).sample
        apart = torch.cat([unet(sample[:1], 900, text[i : i + 1]).sample for i in range(2)])
    assert (together - apart).abs().max() < 1e-5


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.floats(0, 0.75), st.floats(0, 1), st.integers(4, 20), st.integers(4, 20), st.integers(1, 3), st.floats(0, 999)
)
def test_any_setting_and_size_gives_a_finite_repeatable_output(ratio, early, height, width, batch, timestep):
    unet = make_unet()
    agentsd.apply_patch(unet, ratio=ratio, early=early)
    first = call_unet(unet, timestep=timestep, batch=batch, size=(height, width))
    assert first.shape == (batch, 4, height, width) and torch.isfinite(first).all()
    assert torch.equal(call_unet(unet, timestep=timestep, batch=batch, size=(height, width)), first)


# --- applying, nesting, copying ---------------------------------------------------------------------------------------


def test_applying_again_replaces():
    unet = make_unet()
    processors = dict(unet.attn_processors)
    agentsd.apply_patch(unet, ratio=0.2)
    once = call_unet(unet)
    agentsd.apply_patch(unet, ratio=0.5)
    agentsd.apply_patch(unet, ratio=0.2)
    assert torch.equal(call_unet(unet), once)
    agentsd.remove_patch(unet)
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())


def test_config_and_single_settings():
    unet = make_unet()
    config = agentsd.AgentConfig(ratio=0.3, seed=4)
    agentsd.apply_patch(unet, config, early=1.0)
    assert get_patch(unet).config == agentsd.AgentConfig(ratio=0.3, seed=4, early=1.0)


def test_patched_restores_what_was_there():
    unet = make_unet()
    plain = call_unet(unet)
    with agentsd.patched(unet, ratio=0.4) as same:
        assert same is unet
        inside = call_unet(unet)
        with agentsd.patched(unet, ratio=0.1):
            assert not torch.equal(call_unet(unet), inside)
        assert torch.equal(call_unet(unet), inside)
    assert torch.equal(call_unet(unet), plain)
    with pytest.raises(RuntimeError), agentsd.patched(unet):
        raise RuntimeError
    assert get_patch(unet) is None


def test_a_block_that_is_never_left_goes_with_its_model_without_a_word(monkeypatch):
    """Garbage collection clears weak references to a model before it closes the generator that patched it."""

    def block():
        unet = make_unet()
        with agentsd.patched(unet):
            yield unet

    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    never_left = block()
    next(never_left).held_by = never_left
    del never_left
    gc.collect()
    assert not said


def test_patched_keeps_the_length_of_the_run_that_stood_there():
    pipe = make_pipeline(scheduler=DDIMScheduler(**{**SD_BETAS, "num_train_timesteps": 500}))
    agentsd.apply_patch(pipe)
    with agentsd.patched(pipe.unet, ratio=0.5):
        pass
    assert get_patch(pipe).num_train_timesteps == 500


def test_deepcopy_is_patched_by_itself():
    unet = make_unet()
    plain = call_unet(unet)
    agentsd.apply_patch(unet)
    twin = copy.deepcopy(unet)
    assert get_patch(twin).layers[0].attn is not get_patch(unet).layers[0].attn
    agentsd.remove_patch(unet)
    assert torch.equal(call_unet(unet), plain)
    with agentsd.patched(unet):
        assert torch.equal(call_unet(twin), call_unet(unet))
    agentsd.remove_patch(twin)
    assert torch.equal(call_unet(twin), plain)


def test_saved_folder_loads_unpatched(tmp_path):
    pipe = make_pipeline()
    plain = draw(pipe, steps=2)
    agentsd.apply_patch(pipe)
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert get_patch(again) is None
    assert torch.equal(draw(again, steps=2), plain)


def test_training_through_the_patch():
    """Fine-tuning needs gradients in both phases; every weight of the patched layers must receive one."""
    unet = make_unet().train()
    agentsd.apply_patch(unet, early=0.5)
    for timestep in (900, 100):
        unet.zero_grad()
        unet(torch.randn(1, 4, 16, 16), timestep, torch.randn(1, 7, 32)).sample.square().mean().backward()
        attn = get_patch(unet).layers[0].attn
        for name, parameter in attn.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# --- when others change the processors --------------------------------------------------------------------------------


def test_replaced_processors_warn_once_and_can_be_patched_anew():
    unet = make_unet()
    agentsd.apply_patch(unet)
    patched = call_unet(unet)
    unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor2_0())
    with pytest.warns(UserWarning, match="not active on .*AttnProcessor2_0.*apply_patch again"):
        unpatched = call_unet(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(call_unet(unet), unpatched)
    agentsd.apply_patch(unet)
    assert torch.equal(call_unet(unet), patched)


def test_block_inputs_are_not_kept_where_processors_were_replaced():
    unet = make_unet()
    agentsd.apply_patch(unet)
    unet.set_attn_processor(AttnProcessor())
    with pytest.warns(UserWarning, match="the patch is not active"):
        call_unet(unet)
    assert all(state.now is None for state in get_patch(unet).states)


def test_a_dropped_unet_is_freed_at_once():
    """Not only when Python looks for circles of references: the memory of a GPU would be taken until then."""
    unet = make_unet()
    agentsd.apply_patch(unet)
    call_unet(unet)
    dropped = weakref.ref(unet)
    gc.disable()
    try:
        del unet
        assert dropped() is None
    finally:
        gc.enable()


def test_feed_forward_in_chunks_is_not_merged():
    unet = make_unet()
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    agentsd.apply_patch(unet)
    expected = call_unet(unet)
    agentsd.apply_patch(unet, merge_mlp=True)
    assert not torch.equal(call_unet(unet), expected)
    for dim in (0, 1):
        for block in blocks:
            block.set_chunk_feed_forward(1, dim)
        torch.testing.assert_close(call_unet(unet), expected)


def test_an_interrupted_compiled_call_leaves_no_phase_behind(fresh_dynamo):
    unet = make_unet(**ONE_LEVEL)
    compiled = torch.compile(unet, backend="eager")
    agentsd.apply_patch(compiled)
    expected = [call_unet(unet, timestep=timestep) for timestep in (900, 100)]
    call_unet(compiled, timestep=900)
    get_patch(unet).prepared = True  # as Ctrl-C leaves it: torch calls no hook then
    for timestep, output in zip((900, 100), expected):
        assert torch.equal(call_unet(unet, timestep=timestep), output)


def test_removal_keeps_a_processor_set_later():
    unet = make_unet()
    agentsd.apply_patch(unet)
    theirs = diffusers.models.attention_processor.AttnProcessor()
    unet.set_attn_processor(theirs)
    agentsd.remove_patch(unet)
    assert all(processor is theirs for processor in unet.attn_processors.values())


def test_fused_projections():
    unet = make_unet()
    agentsd.apply_patch(unet)
    expected = call_unet(unet)
    unet.fuse_qkv_projections()
    with pytest.warns(UserWarning, match="FusedAttnProcessor2_0"):
        call_unet(unet)
    agentsd.apply_patch(unet)
    assert (call_unet(unet) - expected).abs().max() < 1e-5


# --- compiled ---------------------------------------------------------------------------------------------------------


# Little to trace, and two layers to patch.
ONE_LEVEL = dict(
    block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    mid_block_type=None,
)  # fmt: skip
FOR_LARGE_PICTURES = {"late": "downsample", "max_agents": 4, "max_keys": 9, "match_tile": 8, "merge_mlp": True}


@pytest.mark.parametrize(
    "how, settings",
    [
        ("unet.compile", {}),
        ("unet.compile", FOR_LARGE_PICTURES),
        ("unet.compile first", {}),
        ("blocks", {}),
        ("blocks", FOR_LARGE_PICTURES),
        ("torch.compile first", {}),
    ],
)
def test_compiles_whole_and_chooses_the_phase_outside_the_graph(how, settings, fresh_dynamo):
    unet = make_unet(**ONE_LEVEL)
    config = agentsd.AgentConfig(**settings)
    agentsd.apply_patch(unet, config)
    expected = {timestep: call_unet(unet, timestep=timestep) for timestep in (980, 900, 100, 60)}
    agentsd.remove_patch(unet)
    plain = call_unet(unet)

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = unet
    if how == "unet.compile":
        agentsd.apply_patch(unet, config)
        unet.compile(fullgraph=True, backend=backend)
    elif how == "unet.compile first":
        unet.compile(fullgraph=True, backend=backend)
        agentsd.apply_patch(unet, config)
    elif how == "blocks":
        agentsd.apply_patch(unet, config)
        unet.compile_repeated_blocks(fullgraph=True, backend=backend)
    else:
        model = torch.compile(unet, fullgraph=True, backend=backend)
        agentsd.apply_patch(SimpleNamespace(unet=model))

    counts = []
    for timestep in (980, 900, 100, 60, 980, 100):
        out = call_unet(model, timestep=torch.tensor(timestep))
        assert (out - expected[timestep]).abs().max() < 1e-5
        counts.append(len(graphs))
    if how != "blocks":
        assert counts == [1, 1, 2, 2, 2, 2]  # one graph per phase, none per timestep
    else:
        assert counts[1] == counts[0] and counts[2:] == [counts[2]] * 4
    agentsd.remove_patch(model)
    assert (call_unet(model) - plain).abs().max() < 1e-5
    assert "compile" not in unet.__dict__


def test_compiled_after_the_patch_behind_our_back_is_right_or_refused(fresh_dynamo):
    """torch.compile(unet) of a patched UNet: the phase cannot be chosen outside, so fullgraph must refuse, not err."""
    unet = make_unet(**ONE_LEVEL)
    agentsd.apply_patch(unet)
    expected = [call_unet(unet, timestep=timestep) for timestep in (900, 100)]
    compiled = torch.compile(unet, backend="eager")
    for timestep, right in zip((900, 100), expected):
        assert (call_unet(compiled, timestep=torch.tensor(timestep)) - right).abs().max() < 1e-5
    torch._dynamo.reset()
    with pytest.raises(Exception, match="apply_patch"):
        call_unet(torch.compile(unet, fullgraph=True, backend="eager"), timestep=torch.tensor(900))


# --- bad input --------------------------------------------------------------------------------------------------------


def test_models_without_a_unet_are_refused():
    flux = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), in_channels=4,
    )  # fmt: skip
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=make_vae(), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=flux,
    )  # fmt: skip
    with pytest.raises(TypeError, match="FluxPipeline with a FluxTransformer2DModel.*not a UNet.*SDXL"):
        agentsd.apply_patch(pipe)
    for model in ("runwayml/stable-diffusion-v1-5", None, 3, torch.nn.Linear(2, 2), UNet2DModel(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=8
    )):  # fmt: skip
        with pytest.raises(TypeError, match="UNet2DConditionModel"):
            agentsd.apply_patch(model)
        with pytest.raises(TypeError):
            agentsd.remove_patch(model)


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"ratio": 1.2}, ValueError),
        ({"ratio": "abc"}, TypeError),
        ({"early": -1}, ValueError),
        ({"agent_stride": 0}, ValueError),
        ({"ratio": 0.8}, ValueError),
        ({"ration": 0.4}, TypeError),
        ({"config": 0.4}, TypeError),
    ],
)
def test_a_refused_setting_leaves_the_model_as_it_was(settings, error):
    unet = make_unet()
    agentsd.apply_patch(unet, ratio=0.3)
    before = get_patch(unet)
    with pytest.raises(error):
        agentsd.apply_patch(unet, **settings)
    assert get_patch(unet) is before
    assert all(isinstance(layer.attn.processor, AgentAttnProcessor) for layer in before.layers)


def test_tomesd_first_is_refused_until_removed():
    unet = make_unet()
    tomesd.apply_patch(unet)
    with pytest.raises(ValueError, match="tomesd.remove_patch"):
        agentsd.apply_patch(unet)
    tomesd.remove_patch(unet)
    agentsd.apply_patch(unet)


def test_tomesd_afterwards_says_so():
    unet = make_unet()
    agentsd.apply_patch(unet)
    tomesd.apply_patch(unet)
    with pytest.warns(UserWarning, match="tomesd"):
        call_unet(unet)


def test_continuous_timesteps_warn():
    scheduler = diffusers.EulerDiscreteScheduler(
        **SD_BETAS, timestep_type="continuous", prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0
    )
    with pytest.warns(UserWarning, match="discrete timesteps"):
        agentsd.apply_patch(make_pipeline(scheduler=scheduler))


def test_pipeline_parts_used_here_are_real():
    assert make_tokenizer()("a zebra").input_ids[0] == make_text_encoder().config.bos_token_id
