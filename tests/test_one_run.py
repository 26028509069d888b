"""Step caching knows which run, position and stream a call has: no image depends on another run in silence."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from compat_matrix import CLEAR_ERROR, WARNS, compat
from conftest import SD_BETAS, call_unet, draw, make_pipeline, make_unet
from diffusers import DDIMScheduler
from test_compat_pipelines import make_animatediff, make_pipe, make_sd_with_controlnets, make_sdxl, picture, quiet
from test_step_cache import make_ddim, make_img2img, record_calls
from test_step_cache_controlnet import record_runs

import agentsd
from agentsd.patch import get_patch
from agentsd.unet.sampling_run import find_loop

GROUP = "One run"


def counts(model):
    found = get_patch(model).counts
    return found.whole, found.cached


def untold(call):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="agentsd")
        return call()


def stop_after(last: int):
    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step >= last
        return kwargs

    return stop


# --- 1. stopped runs ------------------------------------------------------------------------------------------------

SCHEDULERS = ["DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler",
              "UniPCMultistepScheduler", "HeunDiscreteScheduler"]  # fmt: skip


@compat(GROUP, "A run after a stopped one")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_stopped_runs_leave_nothing_to_the_next_image(name):
    pipe = agentsd.apply_patch(
        make_pipeline(scheduler=getattr(diffusers, name)(**SD_BETAS)), preset="fast", early=0.0, ratio=0.0
    )
    fresh = draw(pipe, steps=12)
    for last in (0, 1, 4):
        draw(pipe, steps=25, callback_on_step_end=stop_after(last))
        assert torch.equal(untold(lambda: draw(pipe, steps=12)), fresh)


def test_stopped_image_to_image_leaves_nothing_to_a_later_start():
    pipe = make_img2img(agentsd.apply_patch(make_ddim(), preset="fast"))
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(3))
    fresh = draw(pipe, steps=20, image=image, strength=0.6)
    draw(pipe, steps=20, image=image, strength=0.8, callback_on_step_end=stop_after(2))
    assert torch.equal(draw(pipe, steps=20, image=image, strength=0.6), fresh)


def test_stopped_base_runs_leave_nothing_to_the_refiner_on_one_unet():
    """SDXL's denoising_end and denoising_start on the same UNet, twice; the base ends on a whole call."""
    base = agentsd.apply_patch(make_sdxl(), preset="fast")
    refiner = quiet(diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(base))
    calls = record_calls(base.unet)

    def both(seed):
        latents = draw(base, steps=20, seed=seed, denoising_end=0.8)
        ended = calls[-1]
        calls.clear()
        refined = draw(refiner, steps=20, seed=seed, image=latents, denoising_start=0.8)
        return ended, refined

    ended, first = both(0)
    assert ended == "whole"
    both(5)
    assert torch.equal(both(0)[1], first)


# --- 2. two pipelines on one UNet -----------------------------------------------------------------------------------


@compat(GROUP, "Two pipelines on one UNet, a scheduler each")
def test_two_pipelines_each_follow_their_own_scheduler():
    """The other pipeline's class is not known here: features are reused, and its last call is whole."""
    pipe = agentsd.apply_patch(make_ddim(), cache_interval=3, ratio=0.0, early=0.0)
    other = make_pipe(diffusers.StableDiffusionPipeline, unet=pipe.unet)
    other.scheduler = diffusers.DPMSolverMultistepScheduler(**SD_BETAS)
    own, theirs = draw(pipe, steps=20), draw(other, steps=20)
    calls = record_calls(pipe.unet)
    assert torch.equal(untold(lambda: draw(other, steps=20)), theirs) and calls[-1] == "whole"
    assert torch.equal(untold(lambda: draw(pipe, steps=20)), own)
    agentsd.apply_patch(other, cache_interval=3, ratio=0.0, early=0.0)
    assert torch.equal(draw(other, steps=20), theirs)


# --- 3. several calls in a step with one conditioning ---------------------------------------------------------------


def loop_by_hand(unet, timesteps, predict, seed=0):
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for timestep in timesteps:
            sample = sample - 0.02 * predict(unet, sample, timestep)
    return sample


@compat(GROUP, "A guider that calls the UNet again with the same prompt and a hook (PAG, SLG)")
def test_streams_of_one_conditioning_have_features_of_their_own():
    """The same prompt again with a layer skipped: the guidance direction must not vanish in cached calls."""
    unet = agentsd.apply_patch(make_unet(), cache_interval=3, cache_order=0, ratio=0.0, early=0.0)
    text = torch.randn(1, 7, 32)
    directions = []

    def predict(unet, sample, timestep):
        plain = unet(sample, timestep, text).sample
        handle = unet.mid_block.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        guided = unet(sample, timestep, text).sample
        handle.remove()
        directions.append((plain - guided).norm())
        return plain + (plain - guided)

    loop_by_hand(unet, torch.arange(980, 0, -40), predict)
    assert min(directions) > 0.5 * max(directions) > 0 and counts(unet)[1] > 20


def test_streams_of_panorama_views_are_apart():
    pipe = diffusers.StableDiffusionPanoramaPipeline(
        **{**make_ddim().components, "image_encoder": None}, requires_safety_checker=False
    )
    quiet(pipe)
    agentsd.apply_patch(pipe, cache_interval=3, ratio=0.0, early=0.0)
    cached = untold(lambda: draw(pipe, steps=20, height=64, width=576))
    assert counts(pipe)[1] > counts(pipe)[0]
    agentsd.remove_patch(pipe)
    whole = draw(pipe, steps=20, height=64, width=576)
    assert (cached - whole).norm() < 0.5 * whole.norm()


def test_streams_of_two_samplers_in_turns_are_told_and_whole():
    pipe = make_ddim()
    agentsd.apply_patch(pipe.unet, ratio=0.0, early=0.0)
    text = torch.randn(1, 7, 32)
    first, second = torch.arange(980, 0, -40), torch.arange(970, 0, -40)

    def both():
        samples = list(torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0)))
        with torch.no_grad():
            for steps in zip(first, second):
                for number, timestep in enumerate(steps):
                    samples[number] = samples[number] - 0.02 * pipe.unet(samples[number], timestep, text).sample
        return torch.cat(samples)

    expected = both()
    agentsd.apply_patch(pipe.unet, ratio=0.0, early=0.0, cache_interval=3)
    with pytest.warns(UserWarning, match="agentsd: step caching is off: two runs take turns"):
        assert torch.equal(both(), expected)


def test_streams_beyond_the_bound_are_whole_and_told_once():
    unet = agentsd.apply_patch(make_unet(), cache_interval=3, ratio=0.0, early=0.0)
    texts = torch.randn(18, 1, 7, 32)

    def predict(unet, sample, timestep):
        return sum(unet(sample, timestep, text).sample for text in texts) / 18

    with pytest.warns(UserWarning, match="16 calls in a step") as caught:
        loop_by_hand(unet, torch.arange(980, 600, -40), predict)
    assert sum("16 calls" in str(one.message) for one in caught) == 1
    assert get_patch(unet).runs.run.cache.num_kept() <= 32


def test_streams_that_end_within_a_run_make_the_step_after_whole():
    """Guidance in two calls that ends: another number of calls in a step may have moved each stream."""
    unet = agentsd.apply_patch(make_unet(), cache_interval=5, ratio=0.0, early=0.0)
    calls, text = record_calls(unet), torch.randn(2, 1, 7, 32)

    def predict(unet, sample, timestep):
        noise = unet(sample, timestep, text[0]).sample
        return noise + unet(sample, timestep, text[1]).sample if timestep > 800 else noise

    loop_by_hand(unet, torch.arange(980, 200, -40), predict)
    two = 2 * len(range(980, 800, -40))
    assert calls[two : two + 2] == ["cached", "whole"] or calls[two : two + 2] == ["whole", "whole"]
    assert "cached" in calls[two + 2 :]


# --- 4. latents noised anew -----------------------------------------------------------------------------------------


@compat(GROUP, "Latents noised anew at each step (LEDITS++ inversion, SDS)", WARNS, "whole calls, says so")
@pytest.mark.parametrize("tensor", [True, False])
@pytest.mark.parametrize("first", [980, 400, 200])
def test_latents_noised_anew_are_whole_and_told(tensor, first):
    unet = make_unet()
    kept = DDIMScheduler(**SD_BETAS).alphas_cumprod
    image, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)
    timesteps = torch.arange(first, 0, -20) if tensor else range(first, 0, -20)

    def invert():
        generator, outputs = torch.Generator().manual_seed(0), []
        for timestep in timesteps:
            noise = torch.randn(image.shape, generator=generator)
            noised = kept[timestep] ** 0.5 * image + (1 - kept[timestep]) ** 0.5 * noise
            with torch.no_grad():
                outputs.append(unet(noised, timestep, text).sample)
        return torch.cat(outputs)

    expected = invert()
    agentsd.apply_patch(unet, ratio=0.0, early=0.0, cache_interval=3)
    with pytest.warns(UserWarning, match="agentsd: step caching is off where the latent.*noised anew"):
        found = invert()
    # By hand the last steps, to almost no noise, cannot be told apart; they are whole too.
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"]
)
@pytest.mark.parametrize("steps", [12, 20])
def test_latents_of_ancestral_samplers_go_on(name, steps):
    pipe = agentsd.apply_patch(
        make_pipeline(scheduler=getattr(diffusers, name)(**SD_BETAS)), cache_interval=2, ratio=0.0, early=0.0
    )
    untold(lambda: draw(pipe, steps=steps))
    assert counts(pipe)[1] > 0


# --- 5. noise levels ------------------------------------------------------------------------------------------------


@compat(GROUP, "Noise levels for timesteps (EDM, continuous Euler)", note="cached by position; `early` is told")
@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EDMEulerScheduler(),
        diffusers.EDMDPMSolverMultistepScheduler(),
        diffusers.EulerDiscreteScheduler(
            timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True, sigma_min=0.002,
            sigma_max=700.0,
        ),
    ],
    ids=["EDM Euler", "EDM DPM++", "continuous Euler"],
)  # fmt: skip
def test_noise_levels_are_cached_by_position(scheduler):
    pipe = make_pipeline(scheduler=scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agentsd.apply_patch(pipe, cache_interval=5, ratio=0.0)
    calls = record_calls(pipe.unet)
    draw(pipe, steps=6)
    assert calls == ["whole"] * 6
    calls.clear()
    draw(pipe, steps=20)
    assert calls[0] == calls[-1] == "whole" and "cached" in calls
    assert max(run.count("cached") for run in " ".join(calls).split("whole")) <= 2


# --- 7. ControlNet --------------------------------------------------------------------------------------------------


def test_controlnet_called_once_for_two_calls_of_a_step_leaves_no_stand_ins():
    pipe = make_sd_with_controlnets()
    agentsd.apply_patch(pipe, cache_interval=3, cache_order=0)
    text, other = torch.randn(2, 1, 7, 32, generator=torch.Generator().manual_seed(1))
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for index, timestep in enumerate(torch.arange(900, 500, -40)):
            down, mid = pipe.controlnet(sample, timestep, text, picture(), return_dict=False)
            extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            noise = pipe.unet(sample, timestep, text, **extra).sample
            if index >= 4:  # from here on twice
                noise = noise + pipe.unet(sample, timestep, other, **extra).sample
            sample = sample - 0.02 * noise
            assert torch.isfinite(sample).all()


def test_controlnet_whose_middle_residual_is_read_runs_whole():
    """One up block of which all is recomputed: what the middle block adds comes in each call."""
    shape = dict(
        block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
    )
    unet = make_unet(**shape)
    controlnet = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8)).eval()
    pipe = make_pipe(diffusers.StableDiffusionControlNetPipeline, unet=unet, controlnet=controlnet)
    agentsd.apply_patch(pipe, cache_interval=3, cache_depth=2)
    runs = record_runs(pipe)
    assert torch.isfinite(draw(pipe, steps=20, image=picture())).all()
    assert set(runs) == {"whole"} and counts(pipe)[1] > 0


def test_controlnet_images_are_not_kept_after_a_run():
    pipe = agentsd.apply_patch(make_sd_with_controlnets(), cache_interval=3)
    image = picture()
    kept = []
    pipe.controlnet.register_forward_pre_hook(
        lambda module, args, kwargs: kept.append(weakref.ref(kwargs["controlnet_cond"])), with_kwargs=True
    )
    draw(pipe, steps=20, image=image)
    gc.collect()
    assert kept and all(one() is None for one in kept)


# --- 8. other networks and hooks ------------------------------------------------------------------------------------


def test_stages_without_residuals_are_cached():
    """K blocks, as the latent upscaler has them."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=5, block_out_channels=(32, 32, 64, 64),
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
        mid_block_type=None, norm_num_groups=None, cross_attention_dim=32, attention_head_dim=8, act_fn="gelu",
        resnet_time_scale_shift="scale_shift", time_embedding_type="fourier", time_cond_proj_dim=160, conv_in_kernel=1,
        conv_out_kernel=1, timestep_post_act="gelu", only_cross_attention=False,
    ).eval()  # fmt: skip
    image = torch.randn(1, 4, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agentsd.apply_patch(unet, cache_interval=3)
    text = torch.randn(1, 7, 32)

    def predict(unet, sample, timestep):
        return unet(torch.cat([sample, image], 1), timestep, text).sample[:, :4]

    out = loop_by_hand(unet, torch.arange(980, 0, -40), predict)
    assert torch.isfinite(out).all() and counts(unet)[1] > 0


@compat(GROUP, "enable_free_noise_split_inference")
def test_parts_that_run_on_some_frames_each_are_cached():
    def run(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe(
            "a zebra", height=128, width=128, num_frames=5, num_inference_steps=12, generator=generator,
            output_type="latent",
        ).frames  # fmt: skip

    settings = {"ratio": 0.0, "early": 0.0, "cache_interval": 3}  # rounding would match other tokens
    pipe = agentsd.apply_patch(make_animatediff(), **settings)
    whole = run(pipe)
    assert counts(pipe)[1] > 0
    pipe.enable_free_noise_split_inference(spatial_split_size=256, temporal_split_size=2)
    torch.testing.assert_close(untold(lambda: run(pipe)), whole, atol=1e-3, rtol=1e-3)
    pipe = make_animatediff()
    pipe.enable_free_noise_split_inference(spatial_split_size=256, temporal_split_size=2)
    agentsd.apply_patch(pipe, **settings)
    torch.testing.assert_close(untold(lambda: run(pipe)), whole, atol=1e-3, rtol=1e-3)


@compat(GROUP, "A tool that runs a part of the UNet on one sample at a time", WARNS, "whole calls, says so")
def test_parts_that_run_several_times_in_a_call_are_told_and_whole():
    class OneByOne(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, hidden_states, encoder_hidden_states=None, **kwargs):
            pairs = zip(hidden_states.split(1), encoder_hidden_states.split(1))
            return (torch.cat([self.module(x, encoder_hidden_states=text, **kwargs)[0] for x, text in pairs]),)

    pipe = make_ddim()
    attentions = pipe.unet.up_blocks[-1].attentions
    agentsd.apply_patch(pipe, ratio=0.0, early=0.0, cache_interval=3)
    attentions[0] = OneByOne(attentions[0])
    with pytest.warns(UserWarning, match="agentsd: step caching is off: a part of the UNet runs several times"):
        cached = draw(pipe, steps=12)
    assert counts(pipe) == (12, 0)
    attentions[0] = attentions[0].module
    agentsd.remove_patch(pipe)
    torch.testing.assert_close(draw(pipe, steps=12), cached, atol=1e-4, rtol=1e-4)


@compat(GROUP, "diffusers' guiders (skip-layer guidance) on patched layers")
@pytest.mark.parametrize("kind", ["attention", "scores", "queries"])
def test_hooks_of_guiders_on_patched_layers_do_what_they_do_unpatched(kind):
    layer_skip = pytest.importorskip("diffusers.hooks.layer_skip")
    from diffusers.hooks import HookRegistry
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    unet = make_unet()
    agentsd.apply_patch(unet, ratio=0.4)
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    output = AttentionProcessorRegistry.get(type(attn.processor)).skip_processor_output_fn

    def guide():
        if kind == "queries":
            from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceHook

            hook, where = SmoothedEnergyGuidanceHook(5.0), attn.to_q
        else:
            hook, where = layer_skip.AttentionProcessorSkipHook(output, kind == "scores"), attn
        registry = HookRegistry.check_if_exists_or_initialize(where)
        registry.register_hook(hook, "guide")
        try:
            return untold(lambda: call_unet(unet, timestep=900))
        finally:
            registry.remove_hook("guide", recurse=False)

    seen = []
    attn.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    guide()
    assert any("a guider works on it" in reason for reason in get_patch(unet).last_call.outcomes.values())
    patched_input, patched_output = seen[-1]
    agentsd.remove_patch(unet)
    guide()
    assert torch.equal(seen[-1][0], patched_input) and torch.equal(seen[-1][1], patched_output)
    agentsd.apply_patch(unet)
    call_unet(unet, timestep=900)
    assert set(get_patch(unet).last_call.outcomes.values()) == {"active"}


# --- 9. threads -----------------------------------------------------------------------------------------------------


@compat(GROUP, "patched, apply_patch, remove_patch while another thread uses the UNet", CLEAR_ERROR, "changes nothing")
def test_threads_that_change_the_patch_during_a_run_are_refused():
    pipe = agentsd.apply_patch(make_ddim(), preset="fast")
    expected = draw(pipe, steps=12)
    refused = []

    def meddle(*_):
        for change in (
            lambda: agentsd.apply_patch(pipe, ratio=0.1),
            lambda: agentsd.remove_patch(pipe),
            lambda: agentsd.patched(pipe, ratio=0.1).__enter__(),
        ):
            with ThreadPoolExecutor(1) as pool:
                refused.append(pool.submit(change).exception())

    def between_calls(pipe, step, timestep, kwargs):
        if step == 2:
            meddle()
        return kwargs

    assert torch.equal(draw(pipe, steps=12, callback_on_step_end=between_calls), expected)
    handle = pipe.unet.conv_out.register_forward_pre_hook(meddle)  # within a call
    assert torch.equal(draw(pipe, steps=12), expected)
    handle.remove()
    assert len(refused) == 3 + 3 * 12
    assert all(type(one) is RuntimeError and "Nothing was changed" in str(one) for one in refused)
    agentsd.remove_patch(pipe)
    assert get_patch(pipe) is None


def test_threads_with_a_with_block_each_get_their_own_image_or_an_error():
    pipe = make_ddim()
    plain = {name: type(processor) for name, processor in pipe.unet.attn_processors.items()}
    inside, go_on = threading.Event(), threading.Event()
    with agentsd.patched(pipe, ratio=0.4):
        expected = draw(pipe, steps=4)

    def hold():
        with agentsd.patched(pipe, ratio=0.4):
            inside.set()
            assert go_on.wait(60)
            return draw(pipe, steps=4)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(hold)
        assert inside.wait(60)
        with pytest.raises(RuntimeError, match="`with agentsd.patched` block of another thread"):
            with agentsd.patched(pipe, ratio=0.1):
                raise AssertionError("not reached")
        go_on.set()
        assert torch.equal(first.result(), expected)
    assert {name: type(processor) for name, processor in pipe.unet.attn_processors.items()} == plain


def test_threads_inside_a_call_of_their_own_cannot_change_its_patch():
    unet = agentsd.apply_patch(make_unet())
    expected = call_unet(unet)
    errors = []

    def change(*_):
        try:
            agentsd.remove_patch(unet)
        except RuntimeError as error:
            errors.append(str(error))

    handle = unet.conv_out.register_forward_pre_hook(change)
    assert torch.equal(call_unet(unet), expected)
    handle.remove()
    assert errors and "in progress in this thread" in errors[0]
    agentsd.remove_patch(unet)


# --- 10. bookkeeping ------------------------------------------------------------------------------------------------


def test_counts_of_runs_that_end_early_and_of_guidance_that_ends():
    pipe = agentsd.apply_patch(make_ddim(), cache_interval=3, ratio=0.0, early=0.0)
    calls = record_calls(pipe.unet)

    def end_guidance(pipe, step, timestep, kwargs):
        if step == 9:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    for arguments in (
        {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
        {"callback_on_step_end": stop_after(6)},
        {},
        {"steps": 1},
    ):
        calls.clear()
        draw(pipe, **{"steps": 20, **arguments})
        assert counts(pipe) == (calls.count("whole"), calls.count("cached"))


def test_features_of_a_stopped_run_are_freed_at_the_next_call():
    pipe = agentsd.apply_patch(make_ddim(), cache_interval=3, ratio=0.0, early=0.0)
    draw(pipe, steps=20, callback_on_step_end=stop_after(3))
    tracks = get_patch(pipe).runs.run.cache._tracks.values()
    features = [weakref.ref(feature) for track in tracks for _, feature in track.features]
    del tracks
    assert features
    call_unet(pipe.unet)
    assert all(one() is None for one in features)


def test_ctrl_c_within_a_cached_call_leaves_nothing_skipped():
    pipe = agentsd.apply_patch(make_ddim(), cache_interval=3, ratio=0.0, early=0.0)
    unet, sample, text = pipe.unet, torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)
    expected = copy.deepcopy(agentsd.remove_patch(copy.deepcopy(pipe))).unet(sample, 500, text).sample

    def interrupt(*_):
        if get_patch(unet).call.cached:
            raise KeyboardInterrupt

    handle = unet.conv_out.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, steps=20)
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(unet.forward(sample, 500, text).sample, expected)
    assert torch.isfinite(draw(pipe, steps=12)).all()


# --- 11. compiled, settings changed ---------------------------------------------------------------------------------


@compat(GROUP, "Presets in turns under unet.compile(fullgraph=True)", note="beyond torch's limit one sentence of ours")
def test_compiled_settings_changed_take_eight_graphs_or_one_sentence(fresh_dynamo):
    unet = make_unet(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
    )  # fmt: skip
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    unet.compile(fullgraph=True, backend=backend)
    text = torch.randn(1, 7, 32)

    def run(unet):
        return loop_by_hand(unet, torch.arange(980, 0, -40), lambda unet, x, t: unet(x, t, text).sample)

    run(unet)
    try:
        for settings in (
            {}, {"preset": "fast"}, {"preset": "fastest"}, {"preset": "large"}, {"ratio": 0.3}, {"ratio": 0.2},
        ):  # fmt: skip
            agentsd.apply_patch(unet, **settings)
            compiled = run(unet)
            eager = agentsd.apply_patch(copy.deepcopy(make_unet_like(unet)), **settings)
            torch.testing.assert_close(compiled, run(eager), atol=1e-4, rtol=1e-4)
    except RuntimeError as error:
        assert str(error).startswith("agentsd: torch has compiled this UNet for as many settings")
    assert len(graphs) <= 8


def make_unet_like(unet):
    twin = type(unet).from_config(unet.config).eval()
    twin.load_state_dict(unet.state_dict())
    return twin


# --- the loop -------------------------------------------------------------------------------------------------------


def test_a_loop_over_a_part_of_the_timesteps_is_known_to_its_end():
    scheduler = DDIMScheduler(**SD_BETAS)
    scheduler.set_timesteps(20)
    timesteps = scheduler.timesteps[3:15]
    found = [find_loop(t) for t in timesteps]
    assert all(loop.timesteps == tuple(timesteps.tolist()) for loop in found)
    assert [loop.position(t) for loop, t in zip(found, timesteps)] == list(range(12))
    assert found[0].position(scheduler.timesteps[2]) is None and found[0].position(timesteps[0].clone()) is None


def test_new_run_begins_a_run_by_hand():
    unet = agentsd.apply_patch(make_unet(), cache_interval=5, ratio=0.0, early=0.0)
    calls, text, sample = record_calls(unet), torch.randn(1, 7, 32), torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        for timestep in (900, 880, 860):
            unet(sample, timestep, text)
        agentsd.new_run(unet)
        unet(sample, 840, text)
    assert calls == ["whole", "cached", "cached", "whole"]
    assert agentsd.new_run(agentsd.remove_patch(unet)) is unet
