"""step_cache.py: which calls are whole, what they keep, and that no image depends on what ran before."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import diffusers
import pytest
import torch
from compat_matrix import CLEAR_ERROR, WARNS, Row, compat, parametrize
from conftest import SD_BETAS, call_unet, draw, make_pipeline, make_unet
from diffusers import DDIMScheduler
from test_compat_adapters import load_ip_adapter, load_lora, make_pag
from test_compat_execution import offload_groups, offload_models, offload_sequentially
from test_compat_pipelines import (
    draw_frames,
    make_animatediff,
    make_pipe,
    make_sd_with_controlnets,
    make_sd_with_t2i_adapter,
    make_sdxl,
    make_sdxl_with_controlnet,
    picture,
)

import agentsd
from agentsd import Phase
from agentsd.patch import get_patch

GROUP = "Step caching (interval 3)"
ALONE = {"ratio": 0.0, "early": 0.0}  # the cache without agents


def make_ddim(kind="sd15"):
    return make_pipeline(kind, scheduler=DDIMScheduler(**SD_BETAS))


def counts(model) -> tuple[int, int]:
    counts = get_patch(model).counts
    return counts.whole, counts.cached


def record_calls(unet) -> list[str]:
    """ "whole" or "cached" of every UNet call from now on, by whether the first down block's layers run."""
    calls = []
    unet.conv_in.register_forward_hook(lambda *_: calls.append("cached"))
    unet.up_blocks[0].resnets[0].register_forward_hook(lambda *_: calls.__setitem__(-1, "whole"))
    return calls


# --- what a cached call computes --------------------------------------------------------------------------------------


def naive(unet, timesteps, interval, order, depth, sample, text, step=0.02):
    """A run with the feature kept and put back by hand, on the unpatched UNet."""
    last = unet.up_blocks[-1]
    target = list(zip(last.resnets, last.attentions))[len(last.resnets) - depth - 1][1]
    kept, features, outputs = [], [], []
    for index, timestep in enumerate(timesteps):
        whole = index % interval == 0
        if whole:
            handle = target.register_forward_hook(lambda m, a, out: kept.append(out[0]))
        else:
            t1, y1 = features[-1]
            feature = y1
            if order and len(features) > 1:
                t0, y0 = features[-2]
                feature = y1 + 0.5 * (timestep - t1) / (t1 - t0) * (y1 - y0)
            handle = target.register_forward_hook(lambda m, a, out, feature=feature: (feature,))
        with torch.no_grad():
            noise = unet(sample, timestep, text).sample
        handle.remove()
        if whole:
            features.append((timestep, kept[-1]))
        outputs.append(noise)
        sample = sample - step * noise
    return outputs


@pytest.mark.parametrize("interval, order, depth", [(2, 0, 1), (3, 1, 1), (3, 1, "auto"), (5, 0, 2), (4, 1, 2)])
def test_equals_a_naive_run(interval, order, depth):
    unet = make_unet("sd15", layers_per_block=2)
    timesteps = list(range(999, 0, -30))
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 32)
    expected = naive(unet, timesteps, interval, order, 1 if depth == "auto" else depth, sample, text)
    agentsd.apply_patch(unet, **ALONE, cache_interval=interval, cache_order=order, cache_depth=depth)
    calls = record_calls(unet)
    for timestep, output in zip(timesteps, expected):
        with torch.no_grad():
            noise = unet(sample, timestep, text).sample
        torch.testing.assert_close(noise, output, atol=1e-5, rtol=1e-5)
        sample = sample - 0.02 * noise
    assert calls == ["whole" if i % interval == 0 else "cached" for i in range(len(timesteps))]
    assert counts(unet) == (calls.count("whole"), calls.count("cached"))


@pytest.mark.parametrize("settings", [{}, ALONE, {"late": "downsample"}])
def test_interval_1_is_bit_identical_to_no_caching(settings):
    pipe = make_ddim()
    agentsd.apply_patch(pipe, **settings)
    expected = draw(pipe, steps=6)
    agentsd.apply_patch(pipe, **settings, cache_interval=1)
    assert torch.equal(draw(pipe, steps=6), expected) and get_patch(pipe).caching is None
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


def test_the_phase_boundary_is_a_whole_call():
    pipe = agentsd.apply_patch(make_ddim(), cache_interval=5)
    calls, phases = record_calls(pipe.unet), []
    pipe.unet.conv_in.register_forward_hook(lambda *_: phases.append(get_patch(pipe).call.phase))
    draw(pipe, steps=20)
    boundary = phases.index(Phase.MERGE)
    assert boundary == 8 and calls[boundary] == "whole" and calls[boundary - 1] == "cached"


@pytest.mark.parametrize(
    "name, order",
    [("DDIMScheduler", 1), ("DPMSolverMultistepScheduler", 0), ("UniPCMultistepScheduler", 0)],
)
def test_the_scheduler_decides_the_order(name, order):
    """Solvers that extrapolate themselves get reused features; the last call is whole with every scheduler."""
    pipe = make_pipeline(scheduler=getattr(diffusers, name)(**SD_BETAS))
    agentsd.apply_patch(pipe, **ALONE, cache_interval=3)
    calls = record_calls(pipe.unet)
    chosen = draw(pipe, steps=20)
    assert calls[0] == calls[-1] == "whole" and calls[-3:-1] != ["whole", "whole"]
    images = []
    for fixed in (0, 1):
        agentsd.apply_patch(pipe, **ALONE, cache_interval=3, cache_order=fixed)
        images.append(draw(pipe, steps=20))
    assert torch.equal(chosen, images[order]) and not torch.equal(*images)


def test_the_scheduler_is_known_when_its_pipeline_is_gone():
    """`pipe = OtherPipeline.from_pipe(pipe)`: the same scheduler goes on, and the last call is whole with it."""
    pipe = agentsd.apply_patch(
        make_pipeline(scheduler=diffusers.DPMSolverMultistepScheduler(**SD_BETAS)), cache_interval=3
    )
    image = torch.full((1, 3, 128, 128), 0.5)
    expected = draw(make_img2img(pipe), steps=20, image=image, strength=1.0)
    pipe = make_img2img(pipe)
    gc.collect()
    calls = record_calls(pipe.unet)
    assert torch.equal(draw(pipe, steps=20, image=image, strength=1.0), expected)
    assert calls[-1] == "whole" and get_patch(pipe).runs.run.cache.num_kept() == 0


# --- which calls are whole, under any scheduler -----------------------------------------------------------------------

SCHEDULERS = [
    ("DDIMScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("PNDMScheduler", {"skip_prk_steps": False}),
    ("HeunDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverSinglestepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("DDPMScheduler", {}),
]


@pytest.mark.parametrize(
    "name, options, interval",
    [(*one, 3) for one in SCHEDULERS] + [(*one, interval) for one in SCHEDULERS[:4] for interval in (2, 5)],
)
def test_share_of_whole_calls_under_any_scheduler(name, options, interval):
    pipe = make_pipeline(scheduler=getattr(diffusers, name)(**SD_BETAS, **options))
    agentsd.apply_patch(pipe, cache_interval=interval)
    calls = record_calls(pipe.unet)
    first = draw(pipe, steps=30)
    in_a_row = max(len(run) for run in " ".join(calls).replace("whole", "|").replace(" ", "").split("|")) // len(
        "cached"
    )
    assert 1 <= in_a_row <= interval - 1 and calls[0] == calls[-1] == "whole"
    assert calls.count("whole") <= 0.8 * len(calls)
    assert counts(pipe) == (calls.count("whole"), calls.count("cached"))
    assert torch.isfinite(first).all()
    if interval == 3:  # once for each scheduler
        assert torch.equal(draw(pipe, steps=30), first)


@pytest.mark.parametrize(
    "name, options, steps, calls",
    [
        ("LCMScheduler", {}, 4, 4),
        ("EulerDiscreteScheduler", {}, 4, 4),
        ("DDIMScheduler", {}, 1, 1),
        # These call the UNet twice at a timestep, with the latents of two steps.
        ("PNDMScheduler", {"skip_prk_steps": True}, 6, 7),
        ("HeunDiscreteScheduler", {}, 4, 7),
    ],
)
def test_runs_of_few_steps_cache_nothing(name, options, steps, calls):
    pipe = make_pipeline(scheduler=getattr(diffusers, name)(**SD_BETAS, **options, timestep_spacing="trailing"))
    agentsd.apply_patch(pipe)
    expected = draw(pipe, steps=steps)
    agentsd.apply_patch(pipe, cache_interval=3)
    assert torch.equal(draw(pipe, steps=steps), expected) and counts(pipe) == (calls, 0)


@pytest.mark.parametrize("steps, interval, longest", [(12, 3, 1), (20, 5, 2), (25, 5, 3), (50, 5, 4)])
def test_runs_of_some_steps_reuse_a_feature_over_a_part_of_the_run_only(steps, interval, longest):
    pipe = agentsd.apply_patch(make_ddim(), cache_interval=interval)
    calls = record_calls(pipe.unet)
    draw(pipe, steps=steps)
    assert max(run.count("cached") for run in " ".join(calls).split("whole")) == longest


def test_calls_with_gradients_cache_nothing():
    unet = make_unet()
    agentsd.apply_patch(unet, cache_interval=3)
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)
    for timestep in (900, 880, 860):
        out = unet(sample, timestep, text).sample
        assert out.requires_grad
    assert counts(unet)[1] == 0


def test_a_timestep_per_sample_caches_nothing():
    unet = make_unet()
    agentsd.apply_patch(unet, cache_interval=3)
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 32)
    with torch.no_grad():
        for shift in (0, 20, 40):
            unet(sample, torch.tensor([900 - shift, 500 - shift]), text)
    assert counts(unet)[1] == 0


# --- an image never depends on what ran before ------------------------------------------------------------------------


def interrupted(pipe):
    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step >= 5
        return kwargs

    draw(pipe, steps=20, callback_on_step_end=stop)


def failed(pipe):
    def fail(*_):
        raise KeyError("a failing layer")

    handle = pipe.unet.conv_out.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        draw(pipe, steps=20)
    handle.remove()


def make_img2img(pipe):
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    return other


BEFORE = {
    "other prompt": lambda pipe: draw(pipe, steps=20, prompt="a boat"),
    "other seed": lambda pipe: draw(pipe, steps=20, seed=5),
    "interrupted": interrupted,
    "failed": failed,
    "larger batch": lambda pipe: draw(pipe, steps=20, prompt=["a zebra", "a boat"]),
    "other size": lambda pipe: draw(pipe, steps=20, height=96, width=160),
    "one step": lambda pipe: draw(pipe, steps=1),
    "guidance off": lambda pipe: draw(pipe, steps=20, guidance_scale=1.0),
}


@pytest.mark.parametrize("before, order", [*((before, 1) for before in BEFORE), ("interrupted", 0)])
def test_image_never_depends_on_what_ran_before(before, order):
    pipe = agentsd.apply_patch(make_ddim(), cache_interval=3, cache_order=order)
    expected = draw(pipe, steps=20)
    BEFORE[before](pipe)
    assert torch.equal(draw(pipe, steps=20), expected)
    img2img = make_img2img(pipe)
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(3))
    fresh = draw(img2img, steps=20, image=image, strength=0.6)
    BEFORE[before](pipe)
    assert torch.equal(draw(img2img, steps=20, image=image, strength=0.6), fresh)
    assert counts(pipe)[1] > 0


def by_hand(unet, text, seed, timesteps, step=0.02):
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for timestep in timesteps:
            sample = sample - step * unet(sample, timestep, text).sample
    return sample


def test_by_hand_an_interrupted_run_serves_no_later_one():
    """The same text tensor, and a run that starts below the timestep at which another was given up."""
    unet = agentsd.apply_patch(make_unet(), cache_interval=3)
    text = torch.randn(1, 7, 32)
    later = [600, 560, 520, 480, 440]
    expected = by_hand(unet, text, 1, later)
    by_hand(unet, text, 2, [999, 950, 900, 850])
    assert torch.equal(by_hand(unet, text, 1, later), expected)


def test_by_hand_a_walk_of_one_step_runs_is_whole():
    """Frames of a latent walk by a one-step model: the same timestep and text, and latents much alike."""
    unet = agentsd.apply_patch(make_unet(), cache_interval=3)
    text = torch.randn(1, 7, 32)
    one, other = torch.randn(2, 1, 4, 16, 16)
    for i in range(5):
        with torch.no_grad():
            unet(torch.lerp(one, other, i / 20), 999, text)
        assert counts(unet)[1] == 0


def test_by_hand_another_text_is_noticed_at_once_and_other_weights_at_the_next_whole_call():
    unet = agentsd.apply_patch(make_unet(), cache_interval=5)
    text = torch.randn(1, 7, 32)
    sample = torch.randn(1, 4, 16, 16)
    calls = record_calls(unet)
    with torch.no_grad():
        unet(sample, 900, text)
        unet(sample, 880, text)
        for parameter in unet.parameters():
            parameter.mul_(1.01)
        unet(sample, 860, text)
        unet(sample, 840, text)
        text.mul_(1.1)
        unet(sample, 820, text)
        unet(sample, 800, text.clone())  # another tensor of the same contents, as where it is made anew in each step
        unet(sample.half().float(), 780, text + 1)
    assert calls == ["whole", "cached", "cached", "cached", "whole", "cached", "whole"]


def test_freeu_is_noticed_at_once_and_changed_adapters_at_the_next_whole_call():
    pipe = make_ddim()
    load_lora(pipe)
    agentsd.apply_patch(pipe, cache_interval=5)
    calls = record_calls(pipe.unet)
    changes = {2: lambda: pipe.set_adapters("test", 0.3), 4: lambda: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)}

    def change(pipe, step, timestep, kwargs):
        changes.get(step, lambda: None)()
        return kwargs

    draw(pipe, steps=20, callback_on_step_end=change)
    # FreeU comes after the fifth call; the plan's next whole one, where the later phase begins, is the ninth.
    assert calls[:9] == ["whole", "cached", "cached", "whole", "cached", "whole", "cached", "cached", "whole"]


def test_guidance_in_two_calls_equals_guidance_in_one():
    unet = agentsd.apply_patch(make_unet(), cache_interval=3)
    text = torch.randn(2, 7, 32)
    start = torch.randn(1, 4, 16, 16)

    def run(together):
        sample = start
        for timestep in range(990, 0, -45):
            with torch.no_grad():
                if together:
                    noise = unet(sample.expand(2, -1, -1, -1), timestep, text).sample
                else:
                    noise = torch.cat([unet(sample, timestep, text[i : i + 1]).sample for i in range(2)])
            sample = sample - 0.02 * (noise[:1] + 3 * (noise[1:] - noise[:1]))
        return sample

    together, one = run(True), counts(unet)
    apart, two = run(False), counts(unet)
    torch.testing.assert_close(apart, together, atol=1e-4, rtol=1e-4)
    assert two == (2 * one[0], 2 * one[1])


def test_a_copied_pipeline_has_runs_of_its_own():
    pipe = agentsd.apply_patch(make_ddim(), cache_interval=3)
    expected = draw(pipe, steps=20)
    twin = copy.deepcopy(pipe)
    draw(pipe, steps=20, prompt="a boat")
    assert torch.equal(draw(twin, steps=20), expected)
    agentsd.remove_patch(twin)
    assert not any("forward" in vars(module) for module in twin.unet.modules())
    assert torch.equal(draw(pipe, steps=20), expected)


# --- nothing left -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"cache_depth": 2}])
def test_nothing_is_left_after_remove_patch(settings):
    pipe = make_ddim()
    attributes = {name: set(module.__dict__) for name, module in pipe.unet.named_modules()}
    plain = draw(pipe, steps=20)
    agentsd.apply_patch(pipe, cache_interval=3, **settings)
    assert not torch.equal(draw(pipe, steps=20), plain)
    agentsd.remove_patch(pipe)
    assert torch.equal(draw(pipe, steps=20), plain)
    assert {name: set(module.__dict__) for name, module in pipe.unet.named_modules()} == attributes


def test_features_are_freed_at_the_end_of_a_run_and_with_the_unet():
    pipe = agentsd.apply_patch(make_ddim(), cache_interval=3)
    features = []
    runs = get_patch(pipe).runs

    def note(*_, runs=runs):
        tracks = runs.run.cache._tracks.values()
        features.extend(weakref.ref(feature) for track in tracks for _, feature in track.features)

    handle = pipe.unet.register_forward_hook(note)
    draw(pipe, steps=20)
    assert features and all(feature() is None for feature in features)
    unet, gone = pipe.unet, weakref.ref(pipe.unet)
    handle.remove()
    del pipe, runs, note, handle
    gc.collect()
    call_unet(unet, timestep=500)
    gc.disable()
    try:
        del unet
        assert gone() is None
    finally:
        gc.enable()


def test_at_most_two_features_are_kept():
    pipe = agentsd.apply_patch(make_ddim(), cache_interval=2)
    kept = []
    runs = get_patch(pipe).runs
    pipe.unet.register_forward_hook(lambda *_: kept.append(runs.run.cache.num_kept()))
    draw(pipe, steps=20)
    assert max(kept) == 2


# --- together with everything else ------------------------------------------------------------------------------------


def long(call=draw, **arguments):
    return lambda pipe: call(pipe, steps=15, **arguments)


def draw_with_image_prompt_long(pipe):
    image_embeds = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(13))
    return draw(pipe, steps=15, ip_adapter_image_embeds=[image_embeds])


def in_inference_mode(pipe):
    with torch.inference_mode():
        return draw(pipe, steps=15).clone()


ROWS = [
    Row("SD 1.x", make_ddim, long()),
    Row("SD 2.x", lambda: make_ddim("sd2"), long()),
    Row("SDXL", make_sdxl, long()),
    Row("Three levels, depth 2", lambda: make_ddim("sd15-deep"), long(), settings={"cache_depth": 2}),
    Row("LoRA", make_ddim, long(), before=load_lora),
    Row("ControlNet", make_sd_with_controlnets, lambda pipe: draw(pipe, steps=15, image=picture())),
    Row("ControlNet on SDXL", make_sdxl_with_controlnet, lambda pipe: draw(pipe, steps=15, image=picture())),
    Row("T2I-Adapter", make_sd_with_t2i_adapter, lambda pipe: draw(pipe, steps=15, image=picture())),
    Row("IP-Adapter", make_ddim, draw_with_image_prompt_long, before=load_ip_adapter),
    Row("FreeU", make_ddim, long(), after=lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)),
    Row("PAG", make_pag, long(pag_scale=3.0)),
    Row("AnimateDiff", make_animatediff, lambda pipe: draw_frames(pipe, 15)),
    Row("Odd sizes", make_ddim, long(height=152, width=104)),
    Row("bfloat16", lambda: make_ddim().to(torch.bfloat16), long()),
    Row("Model offload before", make_ddim, long(), before=offload_models),
    Row("Model offload after", make_ddim, long(), after=offload_models),
    Row("Sequential offload before", make_ddim, long(), before=offload_sequentially),
    Row("Group offload before", make_ddim, long(), before=offload_groups),
    Row("torch.inference_mode", make_ddim, in_inference_mode),
    Row("Guidance off", make_ddim, long(guidance_scale=1.0)),
]


@parametrize(GROUP, ROWS)
def test_caches_together_with(row):
    """Cached calls happen, the image is near the whole one, repeats bit for bit, and nothing is left."""
    pipe = row.build()
    row.before(pipe)
    agentsd.apply_patch(pipe, **ALONE, **row.settings)
    row.after(pipe)
    whole = row.call(pipe)
    agentsd.remove_patch(pipe)
    agentsd.apply_patch(pipe, **ALONE, cache_interval=3, **row.settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="agentsd")
        cached = row.call(pipe)
        made = counts(pipe)
        assert made[1] >= made[0]
        assert torch.isfinite(cached).all() and not torch.equal(cached, whole)
        assert torch.equal(row.call(pipe), cached)
    agentsd.remove_patch(pipe)
    assert torch.equal(row.call(pipe), whole)


def replaying_backend():
    """A list that gets all numbers that each graph is called with, and a backend that runs graphs as CUDA graphs do.

    Before each run of a graph the outputs of the run before it are overwritten, as their memory is used again.
    """
    numbers = []

    def backend(graph, _):
        stale, seen = [], set()
        numbers.append(seen)

        def replay(*inputs):
            for output in stale:
                output.fill_(torch.nan)
            tensors = [one for one in inputs if isinstance(one, torch.Tensor)]
            seen.add(tuple(one for one in inputs if not isinstance(one, torch.Tensor)))
            outputs = graph.forward(*inputs)
            own = {one.untyped_storage().data_ptr() for one in (*tensors, *graph.parameters(), *graph.buffers())}
            made = [one for one in outputs if isinstance(one, torch.Tensor) and one.is_floating_point()]
            made = [one for one in made if one.untyped_storage().data_ptr() not in own and 0 not in one.stride()]
            stale[:] = made
            return outputs

        return replay

    return numbers, backend


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, marks=compat(GROUP, f"unet.{how}(fullgraph=True)"))
        for how in ("compile", "compile_repeated_blocks")
    ],
)
def test_compiled_it_takes_two_graphs_a_phase(how, fresh_dynamo):
    small = dict(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None, layers_per_block=1,
    )  # fmt: skip
    pipe = make_pipeline(scheduler=DDIMScheduler(**SD_BETAS), **small)
    agentsd.apply_patch(pipe, preset="fast")
    runs = [{"steps": 20}, {"steps": 20, "seed": 1}, {"steps": 20, "prompt": "a lighthouse"}, {"steps": 12}]
    eager = [draw(pipe, **run) for run in runs]
    graphs, backend = replaying_backend()
    torch._dynamo.utils.counters.clear()
    getattr(pipe.unet, how)(fullgraph=True, backend=backend)
    called = []
    for run, expected in zip(runs, eager):  # another seed, prompt and number of steps need no more graphs
        torch.testing.assert_close(draw(pipe, **run), expected, atol=1e-4, rtol=1e-4)
        assert len(graphs) <= 4 and (run is runs[-1] or counts(pipe)[1] > counts(pipe)[0])
        called.append([len(numbers) for numbers in graphs])
    assert not torch._dynamo.utils.counters["graph_break"]
    # All that changes from call to call is a tensor; numbers are sizes. The first run would record all CUDA graphs.
    assert called == [called[0]] * len(runs) and (how != "compile" or set(called[0]) == {1})
    if how == "compile":  # test_one_run.py changes the settings of a whole compiled UNet
        return
    first, modules = len(graphs), list(pipe.unet.modules())
    # The graphs of a patch serve the next one; not with torch 2.8, which takes the numbers of hooks for constants.
    for ratio in (0.3, 0.5, 0.2) if torch.__version__ >= "2.9" else (0.2,):
        agentsd.remove_patch(pipe)
        assert not any("forward" in vars(module) for module in modules)
        agentsd.apply_patch(pipe, cache_interval=2, ratio=ratio)
        compiled = draw(pipe, steps=20)
        assert counts(pipe)[1]
    assert len(graphs) <= 2 * first
    eager = make_pipeline(scheduler=DDIMScheduler(**SD_BETAS), **small)
    agentsd.apply_patch(eager, cache_interval=2, ratio=0.2)
    torch.testing.assert_close(compiled, draw(eager, steps=20), atol=1e-4, rtol=1e-4)


def test_describe_and_last_call_know_it():
    pipe = agentsd.apply_patch(make_ddim(), cache_interval=3)
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(get_patch(pipe).last_call))
    draw(pipe, steps=20)
    cached = [call for call in calls[1:] if call.cached]
    assert cached and all(set(call.outcomes.values()) == {"active"} for call in cached)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"cache_interval": 0}, ValueError),
        ({"cache_interval": 2.5}, TypeError),
        ({"cache_interval": True}, TypeError),
        ({"cache_interval": "abc"}, TypeError),
        ({"cache_interval": 51}, ValueError),
        ({"cache_order": 2}, ValueError),
        ({"cache_order": "1"}, ValueError),
        ({"cache_depth": 0}, ValueError),
        ({"cache_depth": "all"}, ValueError),
        ({"cache_depth": 3, "cache_interval": 2}, ValueError),
        ({"preset": "slow"}, ValueError),
    ],
)
def test_bad_settings_are_refused(settings, error):
    unet = make_unet()
    name = next(iter(settings))
    with pytest.raises(error, match=name) as caught:
        agentsd.apply_patch(unet, **settings)
    assert "must be" in str(caught.value) or "use" in str(caught.value)
    assert get_patch(unet) is None and not any("forward" in vars(module) for module in unet.modules())


def test_presets_are_fields_and_fields_beside_them_win():
    unet = make_unet()
    agentsd.apply_patch(unet, preset="fastest", cache_interval=2)
    config = get_patch(unet).config
    assert (config.cache_interval, config.late, config.max_keys) == (2, "downsample", 1024)
    with pytest.raises(TypeError, match="config and preset"):
        agentsd.apply_patch(unet, agentsd.AgentConfig(), preset="fast")


@compat("Step caching (interval 3)", "DeepCache, T-GATE or a cache hook of diffusers on the model", CLEAR_ERROR)
def test_another_cache_on_the_model_is_refused():
    deepcache = pytest.importorskip("DeepCache", reason="pip install DeepCache")
    pipe = make_ddim()
    helper = deepcache.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    with pytest.raises(ValueError, match="DeepCache is on this model"):
        agentsd.apply_patch(pipe, cache_interval=3)
    helper.disable()
    agentsd.apply_patch(pipe, cache_interval=3)
    helper.enable()
    with pytest.warns(UserWarning, match="step caching is off: DeepCache.*caches too"):
        draw(pipe, steps=20)
    assert counts(pipe)[1] == 0


@compat(GROUP, "SAG", WARNS, "reads the attention of every call: all are whole, says so")
def test_self_attention_guidance_gets_whole_calls():
    pipe = make_pipe(diffusers.StableDiffusionSAGPipeline)
    agentsd.apply_patch(pipe)
    expected = draw(pipe, steps=20, sag_scale=0.75)
    agentsd.apply_patch(pipe, cache_interval=3)
    with pytest.warns(UserWarning, match="agentsd: step caching is off: self-attention guidance"):
        assert torch.equal(draw(pipe, steps=20, sag_scale=0.75), expected)
    assert counts(pipe)[1] == 0


def test_a_hook_of_diffusers_that_caches_is_refused():
    from diffusers.hooks import HookRegistry, ModelHook

    unet = make_unet()
    HookRegistry.check_if_exists_or_initialize(unet.mid_block).register_hook(ModelHook(), "mag_cache_block")
    with pytest.raises(ValueError, match="mag_cache_block"):
        agentsd.apply_patch(unet, cache_interval=2)
