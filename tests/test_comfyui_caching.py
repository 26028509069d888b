"""Step caching of the ComfyUI node, in ComfyUI's own samplers (comfyui_worker.py), against our path on diffusers."""

from __future__ import annotations

import pytest
import torch
from comfyui_support import comfyui  # noqa: F401
from conftest import make_unet

import agentsd
from agentsd.patch import get_patch
from agentsd.unet import caching

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


@pytest.mark.parametrize(
    "sampler, settings",
    [("euler", CACHE), ("dpmpp_2m", CACHE), ("ddim", dict(ratio=0.0, early=0.4))],
    ids=["euler", "dpmpp_2m", "ddim with agents"],
)
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


PLANNED = (
    "euler euler_cfg_pp euler_ancestral euler_ancestral_cfg_pp lms ddpm lcm ddim ipndm ipndm_v deis dpmpp_2m "
    "dpmpp_2m_cfg_pp dpmpp_2m_sde dpmpp_2m_sde_gpu dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu dpmpp_3m_sde "
    "dpmpp_3m_sde_gpu res_multistep res_multistep_cfg_pp res_multistep_ancestral res_multistep_ancestral_cfg_pp "
    "gradient_estimation gradient_estimation_cfg_pp uni_pc uni_pc_bh2 er_sde sa_solver"
).split()
"""Samplers whose whole calls are planned, on diffusers by the same rule."""
COUNTS = {
    **dict.fromkeys(PLANNED, (8, 20)),
    "dpm_fast": (8, 20),
    **dict.fromkeys("heun dpm_2 dpm_2_ancestral dpmpp_2s_ancestral dpmpp_2s_ancestral_cfg_pp".split(), (13, 39)),
    **dict.fromkeys("dpmpp_sde dpmpp_sde_gpu seeds_2 sa_solver_pece".split(), (13, 39)),
    "heunpp2": (19, 57),
    "seeds_3": (20, 58),
}
"""Whole calls of all calls, of 20 karras steps at interval 3."""
AS_ON_THE_CPU = ("dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde_gpu", "dpmpp_sde_gpu")
"""Here they draw the same noise as those without _gpu."""
GOES_BACK = ("heunpp2",)
"""Of its calls more go back than a loop over timesteps has on diffusers; test_a_sampler_that_goes_back_often."""


@pytest.mark.parametrize("scheduler, steps", [("karras", 20), ("normal", 10), ("sgm_uniform", 10)])
def test_every_call_of_every_sampler_equals_the_diffusers_path(comfyui, unet, monkeypatch, scheduler, steps):  # noqa: F811
    """The UNet's calls as ComfyUI's samplers make them, repeated on diffusers in a loop over their timesteps.

    Of samplers that call the model several times in a step, diffusers gets ComfyUI's decisions.
    """
    text = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(4))
    assert set(comfyui("samplers")) - {"dpm_adaptive"} == set(COUNTS)
    for sampler in COUNTS:
        if sampler in AS_ON_THE_CPU:
            continue
        arguments = dict(sampler=sampler, scheduler=scheduler, steps=steps, text=text)
        run = comfyui("recorded", model="sd15", nodes=node(cache_interval=3), **arguments)
        calls, (whole, cached) = run["calls"], run["counts"]
        assert not run["told"] and not run["left"], sampler
        assert whole + cached == len(calls) and (whole <= 0.7 * len(calls) or sampler in GOES_BACK), (sampler, whole)
        if scheduler == "karras":
            assert (whole, len(calls)) == COUNTS[sampler], sampler
        if sampler in GOES_BACK:
            continue
        timesteps = torch.tensor([timestep for _, timestep, _ in calls])
        with monkeypatch.context() as patch, torch.no_grad():
            if sampler not in PLANNED:
                plan = tuple(not one for one in run["cached"])
                patch.setattr(caching, "plan_whole_calls", lambda *args, plan=plan: plan)
            order = int(sampler in ("euler", "ddim"))
            with agentsd.patched(unet, cache_interval=3, cache_order=order, **CACHE):
                for (sample, _, out), timestep in zip(calls, timesteps):
                    expected = unet(sample, timestep, text.expand(len(sample), -1, -1)).sample
                    assert distance(out, expected) < 1e-5, (sampler, timestep)  # here it is 0
                counts = get_patch(unet).counts
        assert (counts.whole, counts.cached) == run["counts"], sampler


def test_a_sampler_that_goes_back_often_equals_the_naive_reference(comfyui, unet):  # noqa: F811
    arguments = dict(model="sd15", nodes=node(cache_interval=3), sampler="heunpp2", scheduler="karras", steps=12)
    run, naive = comfyui("sample", **arguments), comfyui("with_whole_parts", **arguments)
    assert run["counts"] == naive["counts"] and run["counts"][1] > 10
    assert distance(run["latents"], naive["latents"]) < 1e-5


# -- how many calls are whole ----------------------------------------------------------------------------------------


def test_an_interval_of_one_is_whole(comfyui, unet):  # noqa: F811
    run = comfyui("sample", model="sd15", nodes=node(cache_interval=1), steps=12, size=(8, 8))
    assert run["counts"] == (12, 0) and not run["told"]


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


@pytest.mark.parametrize("settings", [dict(cache_interval=3), dict(ratio=0.4, early=0.4)], ids=["cached", "agents"])
def test_an_adaptive_sampler_is_unpatched_and_told(comfyui, unet, settings):  # noqa: F811
    """With agents dpm_adaptive takes nearly twice as many calls on the demo network."""
    arguments = dict(model="sd15", sampler="dpm_adaptive", size=(8, 8), cfg=1.0)
    run, plain = comfyui("sample", nodes=node(**settings), **arguments), comfyui("sample", nodes=[], **arguments)
    assert torch.equal(run["latents"], plain["latents"]) and run["counts"] == (len(plain["calls"]), 0)
    assert len(run["told"]) == 1 and "dpm_adaptive" in run["told"][0]


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
    settings = {"weights": comfyui("lora_of", model="sd15"), "strength": 1.0} if other == "LoRA" else {}
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


def test_a_compiled_model_is_cached_without_agents_and_told(comfyui, unet):  # noqa: F811
    """TorchCompileModel before and after AgentSD: whole calls run in one graph, cached ones uncompiled."""
    arguments = dict(model="sd15", steps=12, size=(8, 8), scheduler="karras")
    expected = comfyui("sample", nodes=node(preset="cache"), **arguments)
    compiles, graphs = [("compile in earnest", {})], set()
    for nodes in ([*node(preset="cache"), *compiles], [*compiles, *node(preset="fast", seed=3)]):
        for sampler in ("euler", "dpmpp_2m"):
            run = comfyui("sample", nodes=nodes, **{**arguments, "sampler": sampler})
            assert run["counts"][1] == 5 and not run["kept"] and not run["hooks"]
            assert len(run["told"]) == 1 and "TorchCompileModel" in run["told"][0]
            graphs.add(run["graphs"])
            if sampler == "euler" and nodes[-1] in compiles:  # the preset fast has phases, so another plan
                assert distance(run["latents"], expected["latents"]) < 1e-5
    assert len(graphs) == 1  # both orders and samplers share it
    assert comfyui("sample", nodes=compiles, **arguments)["counts"] is None


@pytest.mark.parametrize("first", [True, False], ids=["TorchCompileModel before", "TorchCompileModel after"])
def test_a_compiled_model_without_caching_is_whole(comfyui, unet, first):  # noqa: F811
    ours = node(preset="paper")
    nodes = [("compile", {}), *ours] if first else [*ours, ("compile", {})]
    arguments = dict(model="sd15", steps=12, size=(8, 8))
    run, plain = comfyui("sample", nodes=nodes, **arguments), comfyui("sample", nodes=[("compile", {})], **arguments)
    assert torch.equal(run["latents"], plain["latents"]) and len(run["told"]) == 1 and run["counts"] == (12, 0)


def test_a_single_compiled_block_is_cached_without_agents_and_told(comfyui, unet):  # noqa: F811
    block = ("compiled block", {"name": "output_blocks.3.1.transformer_blocks.0"})
    arguments = dict(model="sd15", size=(8, 8))
    plain = comfyui("sample", nodes=[block], steps=4, **arguments)
    cached = comfyui("sample", nodes=node(preset="cache"), steps=12, **arguments)
    for ours in (node(ratio=0.5), node(ratio=0.5, cache_interval=3)):
        run = comfyui("sample", nodes=[block, *ours], steps=4, **arguments)
        assert len(run["told"]) == 1 and "compiled" in run["told"][0]
        assert torch.equal(run["latents"], plain["latents"])
    run = comfyui("sample", nodes=[*node(preset="cache"), block], steps=12, **arguments)
    assert run["counts"] == (7, 5) and distance(run["latents"], cached["latents"]) < 1e-5
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
