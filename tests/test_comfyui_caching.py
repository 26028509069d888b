"""Step caching of the ComfyUI node, in ComfyUI's own samplers (comfyui_worker.py), against our path on diffusers."""

from __future__ import annotations

import pytest
import torch
from comfyui_support import comfyui  # noqa: F401
from conftest import make_unet

import agentsd

CACHE = dict(ratio=0.0, early=0.0)


@pytest.fixture(scope="module")
def unet(comfyui):  # noqa: F811
    """A tiny diffusers UNet; the worker has a ComfyUI model of the same weights."""
    unet = make_unet("sd15", norm_num_groups=32)
    comfyui("make", name="sd15", kind="sd15", weights=unet.state_dict())
    return unet


@pytest.fixture(scope="module")
def demo(comfyui):  # noqa: F811
    """The demo pipeline; the worker has its UNet."""
    pipe = agentsd.load_pipeline("demo")
    comfyui("make", name="demo", kind="demo", weights=pipe.unet.state_dict())
    return pipe


def node(**settings):
    return [("AgentSD", {**CACHE, **settings})]


def distance(one, other):
    return float((one - other).abs().max() / other.std())


# -- the same as on diffusers ----------------------------------------------------------------------------------------


def sample_on_diffusers(unet, noise, text, calls, cfg, solver):
    """Euler's method or DPM++ 2M over ComfyUI's noise levels, with the patched UNet."""
    sigmas = [sigma for sigma, _ in calls["calls"]] + [0.0]
    timesteps = torch.tensor(calls["timesteps"])
    x, before = noise * (1 + sigmas[0] ** 2) ** 0.5, None
    for i, t in enumerate(timesteps):
        sigma, later = sigmas[i], sigmas[i + 1]
        both = torch.cat([x, x]) / (sigma**2 + 1) ** 0.5
        with torch.no_grad():
            negative, positive = unet(both, t, torch.cat([text[1], text[0]])).sample.chunk(2)
        denoised = x - sigma * (negative + cfg * (positive - negative))
        if solver != "dpmpp_2m":
            x = x + (x - denoised) / sigma * (later - sigma)
            continue
        guess = denoised
        if before is not None and later > 0:
            h, last = (torch.tensor(a / b).log() for a, b in ((sigma, later), (sigmas[i - 1], sigma)))
            guess = (1 + h / last / 2) * denoised - h / last / 2 * before
        x, before = later / sigma * (x - guess) + guess, denoised
    return x


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("settings", [CACHE, dict(ratio=0.0, early=0.4)], ids=["caching alone", "agents"])
def test_latents_equal_the_diffusers_path(comfyui, demo, sampler, settings):  # noqa: F811
    # Nothing is merged: rounding changes which token is the most similar, whether or not anything is cached.
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 4, 16, 16, generator=generator)
    with torch.no_grad():
        text = demo.encode_prompt("a castle", "cpu", 1, True)[:2]
    run = comfyui(
        "sample",
        model="demo",
        nodes=node(cache_interval=3, **settings),
        sampler=sampler,
        scheduler="karras",
        steps=14,
        noise=noise,
        text=text,
        cfg=4.0,
    )
    order = 0 if sampler == "dpmpp_2m" else 1
    with agentsd.patched(demo.unet, cache_interval=3, cache_order=order, **settings):
        expected = sample_on_diffusers(demo.unet, noise, text, run, 4.0, sampler)
    assert run["counts"] == (8, 6)
    assert distance(run["latents"], expected) < 1e-4
    plain = comfyui(
        "sample", model="demo", nodes=[], sampler=sampler, scheduler="karras", steps=14, noise=noise, text=text, cfg=4.0
    )
    assert distance(run["latents"], plain["latents"]) > 1e-2


# -- how many calls are whole ----------------------------------------------------------------------------------------


COUNTS = {
    ("euler", 3): 8,
    ("ddim", 3): 8,
    ("dpmpp_2m", 3): 8,
    ("euler_ancestral", 3): 8,
    ("lms", 3): 8,
    ("deis", 3): 8,
    ("euler", 1): 20,
}


@pytest.mark.parametrize("sampler, interval", COUNTS)
def test_counts_of_whole_calls_are_those_of_the_plan(comfyui, unet, sampler, interval):  # noqa: F811
    run = comfyui(
        "sample",
        model="sd15",
        nodes=node(cache_interval=interval),
        sampler=sampler,
        scheduler="karras",
        steps=20,
        size=(8, 8),
    )
    assert run["counts"] == (COUNTS[sampler, interval], 20 - COUNTS[sampler, interval])
    assert not run["told"] and not run["hooks"] and not run["kept"]


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_sde", "uni_pc", "res_multistep", "gradient_estimation"])
def test_other_samplers_are_cached_by_rules_without_a_plan(comfyui, unet, sampler):  # noqa: F811
    run = comfyui(
        "sample",
        model="sd15",
        nodes=node(cache_interval=3),
        sampler=sampler,
        scheduler="karras",
        steps=20,
        size=(8, 8),
    )
    whole, cached = run["counts"]
    assert whole + cached == len(run["calls"]) and whole < len(run["calls"]) / 2 + 1, run["counts"]
    assert torch.isfinite(run["latents"]).all() and not run["told"]


def test_every_sampler_that_comfyui_lists(comfyui, unet):  # noqa: F811
    for sampler in comfyui("samplers"):
        arguments = dict(model="sd15", sampler=sampler, steps=12, size=(8, 8), cfg=1.0)
        run = comfyui("sample", nodes=node(cache_interval=3), **arguments)
        whole, cached = run["counts"]
        assert torch.isfinite(run["latents"]).all() and not run["hooks"] and not run["kept"], sampler
        assert whole + cached == len(run["calls"]), sampler
        if sampler != "dpm_adaptive":
            assert cached >= len(run["calls"]) // 4 and not run["told"], (sampler, whole, cached)


def test_sdxl(comfyui, unet):  # noqa: F811
    comfyui("make", name="sdxl", kind="sdxl", weights=make_unet("sdxl", norm_num_groups=32).state_dict())
    for depth in ("auto", "2"):
        run = comfyui("sample", model="sdxl", nodes=node(cache_interval=3, cache_depth=depth), steps=20)
        plain = comfyui("sample", model="sdxl", nodes=[], steps=20)
        assert run["counts"] == (8, 12) and not run["told"]
        assert 0 < distance(run["latents"], plain["latents"]) < 1


def test_few_steps_are_whole(comfyui, unet):  # noqa: F811
    for sampler in ("lcm", "euler"):
        run = comfyui("sample", model="sd15", nodes=node(cache_interval=5), sampler=sampler, steps=8, size=(8, 8))
        assert run["counts"] == (8, 0)


def test_an_adaptive_sampler_is_whole_and_told(comfyui, unet):  # noqa: F811
    run = comfyui("sample", model="sd15", nodes=node(cache_interval=3), sampler="dpm_adaptive", size=(8, 8))
    assert run["counts"][1] == 0 and "dpm_adaptive" in run["told"][0]


def test_between_percents(comfyui, unet):  # noqa: F811
    arguments = dict(model="sd15", sampler="euler", steps=20, size=(8, 8))
    late = comfyui("sample", nodes=node(cache_interval=5, start_percent=0.5), **arguments)
    none = comfyui("sample", nodes=node(cache_interval=5, start_percent=1.0), **arguments)
    assert 0 < late["counts"][1] < 9 and none["counts"] == (20, 0)
    assert torch.equal(none["latents"], comfyui("sample", nodes=[], **arguments)["latents"])


def test_image_to_image_and_advanced_halves(comfyui, unet):  # noqa: F811
    arguments = dict(model="sd15", nodes=node(cache_interval=3), steps=24, size=(8, 8))
    denoise = comfyui("sample", denoise=0.5, **arguments)
    assert sum(denoise["counts"]) == 24 and denoise["counts"][1] > 10
    half = comfyui("sample", start_step=0, last_step=12, force_full_denoise=False, **arguments)
    assert sum(half["counts"]) == 12 and half["counts"][1] > 4


# -- one run knows nothing of another --------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 17])
def test_a_run_does_not_depend_on_the_run_before_or_its_error(comfyui, unet, at):  # noqa: F811
    arguments = dict(model="sd15", steps=12, sampler="dpmpp_2m", cfg=3.0)
    first = comfyui("sample", nodes=node(cache_interval=3), **arguments)
    fails = [("fails", {"at": at})] if at else []
    again = comfyui("sample", nodes=[*node(cache_interval=3), *fails], again=1, **arguments)
    assert len(again["runs"]) == (1 if at else 2)
    assert torch.equal(first["latents"], again["latents"]) and not again["hooks"] and not again["kept"]


def test_a_cancelled_run_frees_its_features(comfyui, unet):  # noqa: F811
    run = comfyui("cancelled", model="sd15", nodes=node(cache_interval=3))
    assert run == {"raised": "InterruptProcessingException", "kept": False, "hooks": []}


def test_a_batch_of_three(comfyui, unet):  # noqa: F811
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    arguments = dict(model="sd15", nodes=node(cache_interval=3), steps=12)
    three = comfyui("sample", noise=noise, **arguments)["latents"]
    for i in range(3):
        one = comfyui("sample", noise=noise[i : i + 1], **arguments)["latents"]
        assert distance(three[i], one[0]) < 1e-3


# -- what else a feature depends on ----------------------------------------------------------------------------------


def test_a_controlnet_that_stops_early_equals_a_whole_one_bit_for_bit(comfyui, unet):  # noqa: F811
    comfyui("make_controlnet", name="one", seed=1)
    comfyui("make_controlnet", name="other", seed=2)
    for control in (["one"], ["one", "other"]):
        arguments = dict(model="sd15", nodes=node(cache_interval=3), steps=12, control=control)
        stopped = comfyui("sample", **arguments)
        whole = comfyui("with_whole_controlnets", **arguments)
        assert stopped["counts"] == whole["counts"] and stopped["counts"][1] > 5
        assert torch.equal(stopped["latents"], whole["latents"])
        plain = comfyui("sample", model="sd15", nodes=[], steps=12, control=control)
        assert distance(stopped["latents"], plain["latents"]) < 2
        none = comfyui("sample", model="sd15", nodes=[], steps=12)
        assert not torch.equal(none["latents"], plain["latents"])


def test_another_prompt_later_makes_its_step_whole(comfyui, unet):  # noqa: F811
    run = comfyui("sample", model="sd15", nodes=node(cache_interval=5), steps=20, timed=0.52)
    plan = comfyui("sample", model="sd15", nodes=node(cache_interval=5), steps=20)
    assert run["counts"][0] >= plan["counts"][0] and not run["told"]


def test_areas(comfyui, unet):  # noqa: F811
    areas = [(16, 8, 0, 0), (16, 8, 0, 8)]
    run = comfyui("sample", model="sd15", nodes=node(cache_interval=3), steps=22, areas=areas)
    plain = comfyui("sample", model="sd15", nodes=[], steps=22, areas=areas)
    assert run["counts"][1] > run["counts"][0] and len(run["calls"]) == len(plain["calls"])
    assert 0 < distance(run["latents"], plain["latents"]) < 1


@pytest.mark.parametrize("other", ["PAG", "FreeU", "RescaleCFG", "Deep Shrink", "LoRA"])
@pytest.mark.parametrize("first", [True, False])
def test_beside_other_nodes(comfyui, unet, other, first):  # noqa: F811
    settings = {}
    if other == "LoRA":
        settings = {"weights": {}, "strength": 1.0}
    nodes = [(other, settings)]
    ours = node(cache_interval=3)
    run = comfyui("sample", model="sd15", nodes=[*nodes, *ours] if first else [*ours, *nodes], steps=20)
    plain = comfyui("sample", model="sd15", nodes=nodes, steps=20)
    assert run["counts"][1] > run["counts"][0] and not run["told"], run["counts"]
    assert 0 < distance(run["latents"], plain["latents"]) < 1.5


def test_self_attention_guidance_is_whole_and_told(comfyui, unet):  # noqa: F811
    run = comfyui("sample", model="sd15", nodes=[("SAG", {}), *node(cache_interval=3)], steps=12)
    assert run["counts"][1] == 0 and "self-attention guidance" in run["told"][0]
    plain = comfyui("sample", model="sd15", nodes=[("SAG", {})], steps=12)
    assert torch.equal(run["latents"], plain["latents"])


# -- other caches, and nodes that leave us out -----------------------------------------------------------------------


@pytest.mark.parametrize("other", ["EasyCache", "LazyCache"])
def test_a_second_cache_is_one_clear_error(comfyui, unet, other):  # noqa: F811
    before = comfyui("error_of", model="sd15", nodes=[(other, {}), *node(cache_interval=3)])
    assert before.startswith(f"ValueError: AgentSD: {other} is on this model")
    with pytest.raises(RuntimeError, match=f"AgentSD: {other} is on this model"):
        comfyui("sample", model="sd15", nodes=[*node(cache_interval=3), (other, {})], steps=4)


@pytest.mark.parametrize("other", ["EasyCache", "LazyCache"])
@pytest.mark.parametrize("first", [True, False])
def test_calls_that_another_cache_answered_are_counted_as_such(comfyui, unet, other, first):  # noqa: F811
    nodes = [(other, {"threshold": 2.0})]
    nodes = [*nodes, *node(ratio=0.5)] if first else [*node(ratio=0.5), *nodes]
    run = comfyui("sample", model="sd15", nodes=nodes, steps=12, cfg=1.0)
    whole, cached = run["counts"]
    assert cached == 0 and whole < 12 and f"{12 - whole} more were answered by another node" in run["report"]


def test_a_wrapper_that_never_calls_the_model_is_told(comfyui, unet):  # noqa: F811
    for interval in (1, 3):
        run = comfyui("sample", model="sd15", nodes=[*node(cache_interval=interval), ("DeepCache", {})], steps=4)
        assert len(run["told"]) == 1 and "DeepCache" in run["told"][0]
        assert "4 steps never called the model's apply_model" in run["report"]


def test_a_single_compiled_block_runs_unpatched_and_is_told(comfyui, unet):  # noqa: F811
    block = ("compiled block", {"name": "output_blocks.3.1.transformer_blocks.0"})
    plain = comfyui("sample", model="sd15", nodes=[block], steps=4)
    for nodes in ([block, *node(ratio=0.5)], [*node(ratio=0.5, cache_interval=3), block]):
        run = comfyui("sample", model="sd15", nodes=nodes, steps=4)
        assert len(run["told"]) == 1 and "compiled" in run["told"][0]
        assert torch.equal(run["latents"], plain["latents"])
    comfyui("sample", model="sd15", nodes=[], steps=1)  # ComfyUI takes the block off when the next model is loaded


def test_attention_is_upcast_where_comfyui_is_told_to(comfyui, unet):  # noqa: F811
    assert comfyui("upcasts", model="sd15", forced=False) == [False]
    assert comfyui("upcasts", model="sd15", forced=True) == [True]


# -- widgets and report ----------------------------------------------------------------------------------------------


def test_the_report_counts_whole_and_cached_calls(comfyui, unet):  # noqa: F811
    run = comfyui("sample", model="sd15", nodes=node(cache_interval=3), steps=20, cfg=1.0)
    assert "20 model calls" in run["report"] and "8 whole and 12 cached" in run["report"]


def test_presets_take_the_place_of_the_other_widgets(comfyui, unet):  # noqa: F811
    preset = comfyui("sample", model="sd15", nodes=node(preset="fast", ratio=0.1), steps=12)
    custom = comfyui("sample", model="sd15", nodes=node(ratio=0.4, early=0.4, cache_interval=3), steps=12)
    assert torch.equal(preset["latents"], custom["latents"]) and preset["counts"][1] > 0


def test_workflows_of_the_first_version_load_uncached(comfyui, unet):  # noqa: F811
    assert comfyui("patched_with", model="sd15", values=dict(ratio=0.4, early=0.4, late="merge"))["cache_interval"] == 1


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(cache_interval=11), "cache_interval=11: must be an integer in 1 … 10"),
        (dict(cache_interval=0), "cache_interval=0"),
        (dict(start_percent=0.9, end_percent=0.1), "start_percent=0.9, end_percent=0.1"),
        (dict(preset="fasted"), "preset='fasted'"),
        (dict(cache_interval=3, cache_depth="3"), "cache_depth=3: the last level of this UNetModel has 2 pairs"),
    ],
)
def test_bad_input_is_one_clear_message(comfyui, unet, settings, words):  # noqa: F811
    assert words in comfyui("error_of", model="sd15", nodes=node(**settings))


@pytest.mark.parametrize("depth", ["1", "2"])
def test_depth(comfyui, unet, depth):  # noqa: F811
    run = comfyui("sample", model="sd15", nodes=node(cache_interval=3, cache_depth=depth), steps=12)
    assert run["counts"][1] > 4 and not run["hooks"]
