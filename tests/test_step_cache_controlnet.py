"""controlnet.py: before a cached UNet call its ControlNet computes what that call reads, and the image is the same."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import diffusers
import pytest
import torch
from compat_matrix import compat
from conftest import draw, make_unet
from test_compat_execution import offload_models, offload_sequentially
from test_compat_pipelines import (
    left_half,
    make_animatediff,
    make_controlnet,
    make_pipe,
    make_sd_with_controlnets,
    make_sdxl,
    make_sdxl_with_controlnet,
    picture,
    quiet,
)

import agentsd
from agentsd.patch import get_patch

GROUP = "Step caching (interval 3)"
FIXED = {"cache_interval": 3, "cache_order": 1}  # "auto" asks the scheduler, which a bare UNet does not have


def nets(pipe) -> list:
    return list(getattr(pipe.controlnet, "nets", [pipe.controlnet]))


def record_runs(pipe) -> list[str]:
    """ "whole" or "skipped" for every run of the first ControlNet, by whether its middle block's layers run."""
    runs, net = [], nets(pipe)[0]
    net.controlnet_cond_embedding.register_forward_hook(lambda *_: runs.append("skipped"))
    net.mid_block.resnets[0].register_forward_hook(lambda *_: runs.__setitem__(-1, "whole"))
    return runs


def run(pipe, steps: int = 20, **arguments) -> torch.Tensor:
    images = [picture()] * len(nets(pipe))
    return draw(pipe, steps=steps, image=images if len(images) > 1 else images[0], **arguments)


def attributes(module) -> dict:
    return {name: set(part.__dict__) for name, part in module.named_modules()}


def make_union():
    unet = make_unet("sdxl")
    config = dict(diffusers.ControlNetUnionModel.from_unet(unet).config)
    del config["_use_default_values"]
    torch.manual_seed(3)
    narrow = dict(num_trans_channel=32, num_proj_channel=32, num_trans_head=4)
    net = diffusers.ControlNetUnionModel.from_config({**config, **narrow}).eval()
    with torch.no_grad():
        for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            block.weight.normal_(std=0.1)
    return make_sdxl(diffusers.StableDiffusionXLControlNetUnionPipeline, unet=unet, controlnet=net)


def run_union(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "a zebra", height=128, width=128, control_image=[picture()], control_mode=[0], num_inference_steps=20,
        generator=generator, output_type="latent",
    ).images  # fmt: skip


def make_animatediff_with(pipeline_class, controlnet):
    parts = make_animatediff().components
    parts = {name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
    return quiet(pipeline_class(**parts, controlnet=controlnet))


def make_sparse():
    torch.manual_seed(3)
    net = diffusers.SparseControlNetModel(
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        layers_per_block=1, norm_num_groups=8, cross_attention_dim=32, attention_head_dim=4, num_attention_heads=4,
        motion_num_attention_heads=4, conditioning_embedding_out_channels=(8, 8, 8, 8), conditioning_channels=3,
        use_simplified_condition_embedding=False,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            block.weight.normal_(std=0.1)
    return make_animatediff_with(diffusers.AnimateDiffSparseControlNetPipeline, net)


def run_frames(pipe, **arguments) -> torch.Tensor:
    return pipe(
        "a zebra", height=128, width=128, num_frames=3, num_inference_steps=20,
        generator=torch.Generator().manual_seed(0), output_type="latent",
        **{"conditioning_frames": [picture()] * 3, **arguments},
    ).frames  # fmt: skip


def run_inpainting(pipe) -> torch.Tensor:
    return draw(
        pipe, steps=20, image=torch.full((1, 3, 128, 128), 0.5), mask_image=left_half(), control_image=picture()
    )


PIPELINES = {
    "one": (make_sd_with_controlnets, run),
    "two": (lambda: make_sd_with_controlnets(number=2), run),
    "SDXL": (make_sdxl_with_controlnet, run),
    "union": (make_union, run_union),
    "inpainting": (
        lambda: make_sd_with_controlnets(diffusers.StableDiffusionControlNetInpaintPipeline),
        run_inpainting,
    ),
    "PAG": (
        lambda: make_sd_with_controlnets(diffusers.StableDiffusionControlNetPAGPipeline),
        lambda pipe: run(pipe, pag_scale=3.0),
    ),
    "AnimateDiff": (
        lambda: make_animatediff_with(diffusers.AnimateDiffControlNetPipeline, make_controlnet(make_unet())),
        run_frames,
    ),
    "sparse": (
        make_sparse,
        lambda pipe: run_frames(pipe, conditioning_frames=[picture()], controlnet_frame_indices=[0]),
    ),
}


@pytest.mark.parametrize("kind, depth", [*((kind, 1) for kind in PIPELINES), ("two", 2), ("union", 2), ("sparse", 2)])
def test_the_image_is_that_of_a_controlnet_that_runs_whole(kind, depth):
    make, call = PIPELINES[kind]
    pipe = make()
    before = attributes(pipe.controlnet)
    agentsd.apply_patch(pipe.unet, **FIXED, cache_depth=depth)  # without its pipeline: the ControlNet is left alone
    expected = call(pipe)
    counts = get_patch(pipe).counts
    agentsd.apply_patch(pipe, **FIXED, cache_depth=depth)
    runs = record_runs(pipe)
    assert torch.equal(call(pipe), expected)
    assert counts.cached > counts.whole and get_patch(pipe).counts == counts
    assert (runs.count("whole"), runs.count("skipped")) == (counts.whole, counts.cached)
    assert "ControlNet computes its first layers alone" in " ".join(str(agentsd.describe(pipe)).split())
    agentsd.remove_patch(pipe)
    for module in (nets(pipe)[0].controlnet_cond_embedding, nets(pipe)[0].mid_block.resnets[0]):
        module._forward_hooks.clear()  # the test's own
    assert attributes(pipe.controlnet) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.controlnet.modules())


@pytest.mark.parametrize(
    "name", ["PNDMScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"]
)
def test_under_other_schedulers(name):
    pipe = make_sd_with_controlnets()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    agentsd.apply_patch(pipe, **FIXED)
    unskipped = make_sd_with_controlnets()
    unskipped.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    agentsd.apply_patch(unskipped, **FIXED)
    get_patch(unskipped).caching.controlnet.uninstall()
    runs = record_runs(pipe)
    assert torch.equal(run(pipe), run(unskipped))
    assert runs.count("skipped") == get_patch(unskipped).counts.cached > 0


def test_a_whole_image_unpatched_differs():
    """The ControlNet has an effect in these tests, and in cached calls too."""
    pipe = agentsd.apply_patch(make_sd_with_controlnets(), **FIXED)
    controlled = run(pipe)
    assert not torch.equal(controlled, run(pipe, controlnet_conditioning_scale=0.5))
    late = run(pipe, control_guidance_start=0.95)  # in the last call alone, which is cached
    assert not torch.equal(late, run(pipe, control_guidance_start=0.95, controlnet_conditioning_scale=0.0))


# --- an image never depends on what ran before, nor on a wrong expectation --------------------------------------------


def stop_at(last: int):
    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step >= last
        return kwargs

    return stop


BEFORE = {
    "other prompt": lambda pipe: run(pipe, prompt="a boat"),
    "interrupted": lambda pipe: run(pipe, callback_on_step_end=stop_at(5)),
    "larger batch": lambda pipe: run(pipe, prompt=["a zebra", "a boat"]),
    "other size": lambda pipe: run(pipe, height=96, width=160),
    "guidance off": lambda pipe: run(pipe, guidance_scale=1.0),
}


@pytest.mark.parametrize("before", BEFORE)
def test_image_never_depends_on_what_ran_before(before):
    pipe = agentsd.apply_patch(make_sd_with_controlnets(), **FIXED)
    expected = run(pipe)
    img2img = diffusers.StableDiffusionControlNetImg2ImgPipeline.from_pipe(pipe)
    img2img.set_progress_bar_config(disable=True)

    def run_img2img():
        images = {"image": torch.full((1, 3, 128, 128), 0.5), "control_image": picture()}
        return draw(img2img, steps=20, **images, strength=0.6)

    fresh = run_img2img()
    BEFORE[before](pipe)
    assert torch.equal(run(pipe), expected)
    BEFORE[before](pipe)
    assert torch.equal(run_img2img(), fresh)
    assert get_patch(pipe).counts.cached


def test_a_prompt_that_changes_within_a_run():
    def change(pipe, step, timestep, kwargs):
        if step == 3:  # the next call would be cached
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].flip(1)
        return kwargs

    changing = dict(callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    pipe = make_sd_with_controlnets()
    agentsd.apply_patch(pipe.unet, **FIXED)
    expected = run(pipe, **changing)
    assert not torch.equal(expected, run(pipe))
    agentsd.apply_patch(pipe, **FIXED)
    assert torch.equal(run(pipe, **changing), expected)


def test_features_switched_within_a_run():
    def switch(pipe, step, timestep, kwargs):
        if step == 3:
            pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        if step == 19:
            pipe.disable_freeu()
        return kwargs

    pipe = make_sd_with_controlnets()
    agentsd.apply_patch(pipe.unet, **FIXED)
    expected = run(pipe, callback_on_step_end=switch)
    agentsd.apply_patch(pipe, **FIXED)
    assert torch.equal(run(pipe, callback_on_step_end=switch), expected)


class ByHand:
    """A run of a UNet and a ControlNet without a pipeline's loop, in which the UNet's text changes before one call."""

    def __init__(self, changed_at: int, residuals=lambda down, mid: (down, mid)):
        self.pipe = make_sd_with_controlnets()
        self.changed_at, self.residuals = changed_at, residuals

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(1, 4, 16, 16, generator=generator)
        text, other = torch.randn(2, 1, 7, 32, generator=generator)
        image = picture()
        for index, timestep in enumerate(torch.arange(900, 500, -20)):
            down, mid = self.pipe.controlnet(sample, timestep, text, image, return_dict=False)
            down, mid = self.residuals(down, mid)
            noise = self.pipe.unet(
                sample, timestep, other if index >= self.changed_at else text,
                down_block_additional_residuals=down, mid_block_additional_residual=mid,
            ).sample  # fmt: skip
            sample = sample - 0.02 * noise
        return sample


@pytest.mark.parametrize("changed_at", [2, 3, 4])
def test_what_conditions_the_unet_alone_may_change(changed_at):
    """The ControlNet was skipped before a call that turns out whole: it is run whole then."""
    twins = ByHand(changed_at), ByHand(changed_at)
    agentsd.apply_patch(twins[0].pipe.unet, **FIXED)
    agentsd.apply_patch(twins[1].pipe, **FIXED)
    runs = record_runs(twins[1].pipe)
    assert torch.equal(twins[0].run(), twins[1].run())
    assert "skipped" in runs


def test_the_pipeline_may_be_gone():
    """`pipe = OtherPipeline.from_pipe(pipe)` leaves nothing of the patched pipeline but its parts."""
    twins = ByHand(2), ByHand(2)
    agentsd.apply_patch(twins[0].pipe.unet, **FIXED)
    expected = twins[0].run()
    pipe = agentsd.apply_patch(twins[1].pipe, **FIXED)
    twins[1].pipe = SimpleNamespace(unet=pipe.unet, controlnet=pipe.controlnet)
    runs = record_runs(pipe)
    del pipe
    gc.collect()
    assert torch.equal(twins[1].run(), expected) and "skipped" in runs
    assert "ControlNet" in str(agentsd.describe(twins[1].pipe.unet))
    agentsd.remove_patch(twins[1].pipe.unet)
    assert not any("forward" in vars(module) for module in twins[1].pipe.controlnet.modules())


def test_where_it_could_not_be_made_whole_an_error_says_so():
    twin = ByHand(2, residuals=lambda down, mid: ([one * 0.5 for one in down], mid))
    agentsd.apply_patch(twin.pipe, **FIXED)
    with pytest.raises(RuntimeError, match=r"skipped the ControlNet.*cache_interval=1.*apply_patch\(pipe.unet"):
        twin.run()
    agentsd.apply_patch(twin.pipe.unet, **FIXED)
    assert torch.isfinite(twin.run()).all()


def test_without_residuals_nothing_is_asked():
    twin = ByHand(2, residuals=lambda down, mid: (None, None))
    agentsd.apply_patch(twin.pipe, **FIXED)
    assert torch.isfinite(twin.run()).all()


def test_calls_with_gradients_are_whole():
    pipe = agentsd.apply_patch(make_sd_with_controlnets(), **FIXED)
    runs = record_runs(pipe)
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)
    for timestep in (900, 860, 820):
        down, mid = pipe.controlnet(sample, timestep, text, picture(), return_dict=False)
        pipe.unet(sample, timestep, text, down_block_additional_residuals=down, mid_block_additional_residual=mid)
    assert runs == ["whole"] * 3


def test_in_guess_mode_it_runs_whole():
    pipe = make_sd_with_controlnets()
    agentsd.apply_patch(pipe.unet, **FIXED)
    expected = run(pipe, guess_mode=True)
    agentsd.apply_patch(pipe, **FIXED)
    runs = record_runs(pipe)
    assert torch.equal(run(pipe, guess_mode=True), expected)
    assert set(runs) == {"whole"} and get_patch(pipe).counts.cached


# --- whose it is ------------------------------------------------------------------------------------------------------


def test_a_copied_pipeline_has_a_controlnet_of_its_own():
    pipe = make_sd_with_controlnets()
    before = attributes(pipe.controlnet)
    agentsd.apply_patch(pipe, **FIXED)
    expected = run(pipe)
    twin = copy.deepcopy(pipe)
    run(pipe, prompt="a boat")
    runs = record_runs(twin)
    assert torch.equal(run(twin), expected)
    assert "skipped" in runs
    agentsd.remove_patch(twin)
    assert attributes(twin.controlnet) == before
    assert not twin.controlnet._forward_hooks and not twin.controlnet._forward_pre_hooks
    assert torch.equal(run(pipe), expected)


def test_another_controlnet_after_the_patch_runs_whole():
    pipe = agentsd.apply_patch(make_sd_with_controlnets(), **FIXED)
    first, before = pipe.controlnet, attributes(make_sd_with_controlnets().controlnet)
    pipe.controlnet = make_controlnet(make_unet(), seed=9)
    runs = record_runs(pipe)
    patched = run(pipe)
    assert set(runs) == {"whole"} and get_patch(pipe).counts.cached
    agentsd.apply_patch(pipe, **FIXED)  # applied again, it is skipped too
    runs.clear()
    assert torch.equal(run(pipe), patched) and "skipped" in runs
    agentsd.remove_patch(pipe)
    assert attributes(first) == before


def test_shared_by_two_pipelines_the_last_patch_has_it():
    one, other = make_sd_with_controlnets(), make_sd_with_controlnets()
    shared = one.controlnet
    other = make_pipe(diffusers.StableDiffusionControlNetPipeline, unet=other.unet, controlnet=shared)
    agentsd.apply_patch(one, **FIXED)
    expected = run(one)
    agentsd.apply_patch(other, **FIXED)
    runs = record_runs(other)
    assert torch.equal(run(other), expected) and "skipped" in runs
    runs.clear()
    assert torch.equal(run(one), expected) and set(runs) == {"whole"}
    run(other, callback_on_step_end=stop_at(5))
    assert torch.equal(run(one), expected)
    agentsd.remove_patch(one)
    runs.clear()
    assert torch.equal(run(other), expected) and "skipped" in runs
    agentsd.remove_patch(other)
    assert not any("forward" in vars(module) for module in shared.modules())
    assert not shared._forward_hooks and not shared._forward_pre_hooks


@pytest.mark.parametrize("stop, kind", [(3, "after"), (4, "within"), (5, "after")])
def test_shared_with_an_unpatched_unet(stop, kind):
    """A run of another UNet, with the same seed and prompt, after a stopped one of the patched UNet or within it."""
    pipe = make_sd_with_controlnets()
    other = make_pipe(
        diffusers.StableDiffusionControlNetPipeline, unet=copy.deepcopy(pipe.unet), controlnet=pipe.controlnet
    )
    expected = run(other)
    agentsd.apply_patch(pipe, **FIXED)
    cached = run(pipe)

    def run_other(pipe, step, timestep, kwargs):
        if step == stop:
            assert torch.equal(run(other), expected)
        return kwargs

    if kind == "after":
        run(pipe, callback_on_step_end=stop_at(stop))
        assert torch.equal(run(other), expected)
        run(pipe, callback_on_step_end=stop_at(stop))
        img2img = diffusers.StableDiffusionControlNetImg2ImgPipeline.from_pipe(other)
        images = {"image": torch.full((1, 3, 128, 128), 0.5), "control_image": picture()}
        for strength in (0.75, 0.85):
            assert torch.isfinite(draw(quiet(img2img), steps=20, **images, strength=strength)).all()
    else:
        assert torch.equal(run(pipe, callback_on_step_end=run_other), cached)
    assert torch.equal(run(pipe), cached)


def test_it_keeps_no_unet_alive_and_is_pickled_without_one():
    pipe = agentsd.apply_patch(make_sd_with_controlnets(), **FIXED)
    run(pipe)
    controlnet, gone = pipe.controlnet, weakref.ref(pipe.unet)
    size = len(pickle.dumps(make_sd_with_controlnets().controlnet))
    assert len(pickle.dumps(controlnet)) < 1.2 * size
    del pipe
    gc.collect()
    assert gone() is None
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)
    with torch.no_grad():  # it works on
        alone = [controlnet(sample, timestep, text, picture()).mid_block_res_sample for timestep in (900, 860)]
    assert all(torch.isfinite(one).all() for one in alone)


@pytest.mark.parametrize("offload", [offload_models, offload_sequentially])
@pytest.mark.parametrize("order", ["before", "after"])
def test_offloaded(offload, order):
    pipe = make_sd_with_controlnets()
    agentsd.apply_patch(pipe, **FIXED)
    expected = run(pipe)
    pipe = make_sd_with_controlnets()
    if order == "before":
        offload(pipe)
    agentsd.apply_patch(pipe, **FIXED)
    if order == "after":
        offload(pipe)
    runs = record_runs(pipe)
    torch.testing.assert_close(run(pipe), expected, atol=1e-5, rtol=1e-5)
    assert "skipped" in runs


@compat(GROUP, "ControlNet compiled", note="a compiled ControlNet runs whole in every step")
def test_a_compiled_controlnet_runs_whole_in_one_graph(fresh_dynamo):
    pipe = make_sd_with_controlnets()
    agentsd.apply_patch(pipe, **FIXED)
    eager = run(pipe)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    pipe.controlnet.compile(fullgraph=True, backend=backend)
    torch.testing.assert_close(run(pipe), eager, atol=1e-4, rtol=1e-4)
    assert len(graphs) == 1 and get_patch(pipe).counts.cached
    assert "ControlNet" not in str(agentsd.describe(pipe)).split("\n\n")[0].partition("step caching")[2]


def test_under_a_compiled_unet_it_is_skipped(fresh_dynamo):
    unet = make_unet(
        block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
    )  # fmt: skip
    pipe = make_pipe(diffusers.StableDiffusionControlNetPipeline, unet=unet, controlnet=make_controlnet(unet))
    agentsd.apply_patch(pipe, **FIXED, early=0.0)  # one phase: two graphs, of whole calls and of cached ones
    eager = run(pipe)
    pipe.unet.compile(fullgraph=True, backend="eager")
    runs = record_runs(pipe)
    torch.testing.assert_close(run(pipe), eager, atol=1e-4, rtol=1e-4)
    assert "skipped" in runs
