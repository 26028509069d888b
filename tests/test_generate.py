"""images/: three methods from one seed, fair timing, and images that carry their settings."""

from __future__ import annotations

import dataclasses
import json
import os
import re

import numpy as np
import pytest
import tomesd
import torch
from conftest import SD_BETAS, make_pipeline
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler, LCMScheduler, PNDMScheduler
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import agentsd
from agentsd import AgentConfig, Phase
from agentsd.config import PRESETS
from agentsd.images.compare import Comparison, are_stable, comparison_image
from agentsd.images.generate import GeneratedImage, generate, settings_of
from agentsd.images.methods import METHODS, use_method
from agentsd.images.png import METADATA_KEY, check_output, read_settings, save_image
from agentsd.images.request import Request, unread_part
from agentsd.images.warm_up import warm_up, warm_up_timesteps
from agentsd.patch import get_patch
from agentsd.unet.layers import find_layers

REQUEST = Request("a zebra", steps=4, seed=3)


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


def pixels(result):
    return np.asarray(result.image)


def test_methods_differ_and_repeat_exactly(pipe):
    first = {method: generate(pipe, REQUEST, method) for method in METHODS}
    torch.manual_seed(99)  # ToMeSD left alone would follow the global generator
    second = {method: generate(pipe, REQUEST, method) for method in reversed(METHODS)}
    for method in METHODS:
        assert np.array_equal(pixels(first[method]), pixels(second[method])), method
        assert first[method].image.size == (128, 128)
    assert not np.array_equal(pixels(first["sd"]), pixels(first["tomesd"]))
    assert not np.array_equal(pixels(first["tomesd"]), pixels(first["agentsd"]))
    assert get_patch(pipe) is None


def test_tomesd_reaches_the_same_layers_on_sdxl_shapes():
    from conftest import call_unet, make_unet

    unet = make_unet("sdxl")
    plain = call_unet(unet)
    with use_method(unet, "tomesd", AgentConfig()):
        assert not torch.equal(call_unet(unet), plain)  # with ToMeSD's own default it would be a silent no-op
    assert torch.equal(call_unet(unet), plain)
    assert not hasattr(unet, "_tome_info")
    with use_method(unet, "tomesd", AgentConfig(use_rand=False)):
        theirs = call_unet(unet)
    with use_method(unet, "agentsd", AgentConfig(use_rand=False, early=0.0)):
        assert (call_unet(unet) - theirs).abs().max() < 1e-5


def test_compare_warms_up_and_interleaves_in_rotating_order(pipe):
    order = []
    comparison = agentsd.compare(
        pipe, REQUEST.prompt, steps=REQUEST.steps, seed=REQUEST.seed, rounds=2,
        on_round=lambda method, number: order.append((number, method)),
    )  # fmt: skip
    assert [method for number, method in order if number == 0] == list(METHODS)
    assert [method for number, method in order if number == 1] == ["tomesd", "agentsd", "sd"]
    assert [method for number, method in order if number == 2] == ["agentsd", "sd", "tomesd"]
    assert len(order) == 9 and [result.method for result in comparison] == list(METHODS)
    for result in comparison:
        assert len(result.all_seconds) == 2
        assert min(result.all_seconds) <= result.seconds <= max(result.all_seconds)
        assert np.array_equal(pixels(result), pixels(generate(pipe, REQUEST, result.method)))
    figure = np.asarray(comparison.figure())
    for i, result in enumerate(comparison):
        left = 8 + i * (128 + 8)
        assert np.array_equal(figure[8:136, left : left + 128], pixels(result))
    assert len(figure) > 136 + 20 and (figure[140:] < 128).any()  # there is a caption
    assert get_patch(pipe) is None


def results_in(*all_seconds, size=(64, 64)):
    image = Image.new("RGB", size)
    return tuple(GeneratedImage(method, image, seconds, {}) for method, seconds in zip(METHODS, all_seconds))


def test_a_comparison_is_read_by_method_by_position_and_in_print(tmp_path):
    comparison = Comparison(results_in((4.0, 4.1, 4.0), (2.0, 2.0, 2.1), (1.0, 1.0, 1.1)))
    assert comparison["agentsd"] is comparison[2] and len(comparison) == 3 and comparison.stable
    assert comparison.speed_up("agentsd") == 4.0
    with pytest.raises(KeyError, match="compared were sd, tomesd, agentsd"):
        comparison["todo"]
    assert repr(comparison).splitlines() == [
        "Stable Diffusion     4.00 s   1.00x",
        "ToMeSD               2.00 s   2.00x",
        "AgentSD              1.00 s   4.00x",
        "median of 3 interleaved rounds after a warm-up",
        "PSNR to the image of Stable Diffusion, higher is nearer: ToMeSD equal, AgentSD equal",
    ]
    markup = comparison._repr_html_()
    assert markup.startswith("<img") and "data:image/png;base64," in markup and "median of 3" in markup
    assert "ToMeSD equal" in markup
    comparison.save(tmp_path / "a.png")
    assert read_settings(tmp_path / "a.png") == comparison.to_dict()
    assert "rounds differ by more than 15%" in str(Comparison(results_in((4.0, 5.0), (2.0, 2.0))))
    assert "3 rounds give a speed-up" in str(Comparison(results_in((4.0,))))


def test_settings_of_a_comparison_by_name_and_by_config(pipe):
    comparison = agentsd.compare(
        pipe, "a zebra", steps=1, rounds=1, methods=["agentsd"], config=AgentConfig(seed=5, ratio=0.2), ratio=0.3
    )
    assert comparison["agentsd"].settings["patch"] == dataclasses.asdict(AgentConfig(seed=5, ratio=0.3))
    fast = agentsd.compare(pipe, "a zebra", steps=1, rounds=1, methods=["agentsd"], preset="fast", ratio=0.3)
    assert fast["agentsd"].settings["patch"] == dataclasses.asdict(AgentConfig(**PRESETS["fast"], ratio=0.3))
    for arguments, error, message in [
        ({"rato": 0.3}, TypeError, r"unknown setting rato \(did you mean ratio\?\); the settings are ratio"),
        ({"config": 0.3}, TypeError, "config=0.3: must be an AgentConfig"),
        ({"preset": "magic"}, ValueError, "preset='magic': must be one of paper, fast"),
        ({"preset": "fast", "config": AgentConfig()}, TypeError, "config and preset"),
        ({"rounds": 0}, ValueError, "rounds=0: must lie in 1 … 100"),
        ({"rounds": 1.5}, TypeError, "rounds=1.5"),
        ({"methods": []}, ValueError, "methods="),
        ({"methods": ["sd", "sd"]}, ValueError, "each once"),
        ({"methods": ["todo"]}, ValueError, "method='todo'"),
        ({"steps": 0}, ValueError, "steps=0"),
    ]:
        with pytest.raises(error, match=message):
            agentsd.compare(pipe, "a zebra", **arguments)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tool", ["agentsd", "tomesd"])
def test_an_already_patched_pipeline_is_refused_and_keeps_its_patch(pipe, tool, method):
    """Its "sd" image would be an agentsd image that is labelled as unpatched."""
    ours = tool == "agentsd"
    agentsd.apply_patch(pipe, ratio=0.2) if ours else tomesd.apply_patch(pipe, ratio=0.2)
    try:
        for run in (
            lambda: generate(pipe, REQUEST, method),
            lambda: warm_up(pipe, REQUEST, method),
            lambda: agentsd.compare(pipe, "a zebra", methods=[method], rounds=1, steps=1),
        ):
            with pytest.raises(ValueError, match=f"already patched.*{tool}.remove_patch"):
                run()
        if ours:
            assert get_patch(pipe).config.ratio == 0.2
    finally:
        agentsd.remove_patch(pipe) if ours else tomesd.remove_patch(pipe)
        vars(pipe.unet).pop("_tome_info", None)  # which tomesd.remove_patch leaves behind
    assert generate(pipe, REQUEST, method)


def test_a_compiled_unet_is_refused_by_compare():
    pipe = make_pipeline()
    pipe.unet.compile()  # compiles nothing before the first call
    with pytest.raises(ValueError, match="UNet is compiled.*Compare before compiling"):
        agentsd.compare(pipe, "a zebra", rounds=1, steps=1)


def test_speed_up_is_over_the_first():
    results = results_in((4.0, 2.0, 3.0), (1.5,))
    assert results[0].seconds == 3.0
    from agentsd.images.compare import _timing, _title

    patch = dataclasses.asdict(AgentConfig(cache_interval=3))
    assert _title(dataclasses.replace(results[1], method="agentsd", settings={"patch": patch})) == (
        "AgentSD  ratio 0.4, caching 3"
    )
    assert _title(results[0]) == "Stable Diffusion"
    assert _timing(results[0], results[0], stable=True) == "3.00 s"
    assert _timing(results[1], results[0], stable=True) == "1.50 s,  2.00x as fast"
    assert _timing(results[1], results[0], stable=False) == "about 2 s"  # no figure that would not be met again
    assert "2.00x" in str(Comparison(results_in((2.0, 2.0), (1.0, 1.0))))
    for unstable in (results_in((2.0, 3.0), (1.0, 1.0)), results_in((2.0,), (1.0,))):
        assert not re.search(r"\d[.]\d", str(Comparison(unstable)))


def test_a_comparison_says_what_it_costs_and_why_nothing_was_cached():
    base, other = results_in((2.0,), (1.0,))
    settings = {"steps": 4, "patch": {"ratio": 0.4, "cache_interval": 3}, "unet_calls": {"whole": 4, "cached": 0}}
    other = dataclasses.replace(other, method="agentsd", image=Image.new("RGB", (64, 64), (2, 2, 2)), settings=settings)
    comparison = Comparison((base, other))
    assert comparison.psnr("agentsd") == pytest.approx(10 * np.log10(255**2 / 4)) and comparison.psnr("sd") == np.inf
    assert str(comparison).endswith("Stable Diffusion, higher is nearer: AgentSD 42.1 dB")
    assert "4 whole + 0 cached UNet calls (runs of fewer than 10 steps are not cached)" in str(comparison)
    from agentsd.images.compare import _title

    assert _title(other) == "AgentSD  ratio 0.4, nothing cached"
    assert "higher is nearer" not in str(Comparison((base,)))


def test_unstable_timings_are_called_unstable():
    for all_seconds, steady in [((2.0, 2.1), True), ((2.0, 3.0), False), ((2.0,), False)]:
        assert are_stable(results_in(all_seconds, (1.0, 1.0))) is steady
    unstable = np.asarray(comparison_image(results_in((2.0,), size=(256, 64))))
    stable = np.asarray(comparison_image(results_in((2.0, 2.0), size=(256, 64))))
    assert (unstable < 200).sum() > (stable < 200).sum()  # the caption says so too


def test_saved_image_can_be_generated_again_from_itself(pipe, tmp_path):
    config = AgentConfig(ratio=0.3, merge_stride=(2, 4), seed=7)
    result = generate(pipe, REQUEST, "agentsd", config)
    path = tmp_path / "zebra.png"
    save_image(result.image, path, result.settings)
    settings = read_settings(path)
    fields = {name: settings[name] for name in Request.__dataclass_fields__}
    patch = {k: tuple(v) if isinstance(v, list) else v for k, v in settings["patch"].items()}
    again = generate(pipe, Request(**fields), settings["method"], AgentConfig(**patch))
    assert np.array_equal(np.asarray(Image.open(path)), pixels(again))
    assert settings["scheduler"] == "PNDMScheduler" and settings["dtype"] == "float32"
    assert settings["versions"]["agentsd"] == agentsd.__version__
    assert os.listdir(tmp_path) == ["zebra.png"]
    assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~_umask())


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_settings_with_numpys_numbers_are_saved(pipe, tmp_path):
    request = Request("a", guidance=np.float64(5), seed=3)
    settings = settings_of(pipe, request, "agentsd", AgentConfig(ratio=np.float32(0.25), agent_stride=np.int64(2)))
    settings["patch"]["seed"] = 7
    assert json.loads(json.dumps(settings))["patch"]["ratio"] == 0.25
    plain = settings_of(pipe, dataclasses.replace(request, guidance=5.0), "sd", AgentConfig())
    object.__setattr__(request, "seed", np.int64(3))  # as AgentConfig lets pass
    assert json.dumps(settings_of(pipe, request, "sd", AgentConfig())) == json.dumps(plain)


def test_text_of_any_script_survives(tmp_path):
    save_image(Image.new("RGB", (4, 4)), tmp_path / "a.png", {"prompt": "斑马 “zèbre” 🦓"})
    assert read_settings(tmp_path / "a.png") == {"prompt": "斑马 “zèbre” 🦓"}
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    assert read_settings(tmp_path / "b.png") is None


def test_a_name_as_long_as_the_system_allows(tmp_path):
    path = tmp_path / ("x" * 251 + ".png")
    save_image(Image.new("RGB", (8, 8)), path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_failed_save_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.png"
    save_image(Image.new("RGB", (4, 4), "red"), path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_image(Image.new("RGB", (4, 4)), path, {"not": object()})

    class Broken(Image.Image):
        def save(self, *args, **kwargs):
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_image(Broken(), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_outputs_are_checked_beforehand(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for path, error, message in [
        (tmp_path / "a.jpg", ValueError, "must end in .png"),
        (tmp_path / "missing" / "a.png", FileNotFoundError, "does not exist"),
        (tmp_path / "folder.png", IsADirectoryError, "is a folder"),
    ]:
        with pytest.raises(error, match=message):
            check_output(path)
    if os.path.isdir("/proc/self"):
        with pytest.raises(PermissionError, match="cannot be written to"):
            check_output("/proc/self/a.png")
    assert check_output(tmp_path / "a.png") == tmp_path / "a.png" and os.listdir(tmp_path) == ["folder.png"]


@pytest.mark.parametrize(
    "fields, error",
    [
        ({"prompt": ""}, ValueError),
        ({"prompt": " \n"}, ValueError),
        ({"prompt": None}, ValueError),
        ({"negative_prompt": 3}, TypeError),
        ({"steps": 0}, ValueError),
        ({"steps": 2.5}, TypeError),
        ({"guidance": -1}, ValueError),
        ({"guidance": float("nan")}, ValueError),
        ({"guidance": "high"}, TypeError),
        ({"seed": -1}, ValueError),
        ({"height": 100}, ValueError),
        ({"width": 0}, ValueError),
        ({"width": 64.0}, TypeError),
    ],
)
def test_bad_requests(fields, error):
    name = next(iter(fields))
    with pytest.raises(error, match=f"{name}="):
        Request(**{"prompt": "a zebra", **fields})


@pytest.mark.parametrize("method", ["tomesd", "agentsd"])
def test_a_method_that_would_change_nothing_is_refused(pipe, method):
    plain = make_pipeline(
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
    )
    with pytest.raises(ValueError, match="would change no layer of this UNet2D.*: it has no self-attention"):
        generate(plain, REQUEST, method)
    assert generate(plain, REQUEST, "sd").image.size == (128, 128)


def test_unknown_method(pipe):
    with pytest.raises(ValueError, match="method='magic': must be one of sd, tomesd, agentsd"):
        generate(pipe, REQUEST, "magic")


# --- steps, memory, prompts -------------------------------------------------------------------------------------------


def test_each_step_is_told_and_does_not_count(pipe):
    import time

    steps = []

    def slow(step):
        steps.append(step)
        time.sleep(0.3)

    start = time.perf_counter()
    result = generate(pipe, REQUEST, "agentsd", None, slow)
    whole = time.perf_counter() - start
    plain = generate(pipe, REQUEST, "agentsd")
    assert np.array_equal(pixels(result), pixels(plain))
    assert [step.number for step in steps] == [1, 2, 3, 4, 5] and {step.total for step in steps} == {5}  # PLMS
    assert [step.timestep for step in steps] == sorted((step.timestep for step in steps), reverse=True)
    assert steps[-1].latents.shape == (1, 4, 16, 16) and not torch.equal(steps[0].latents, steps[-1].latents)
    assert whole - result.seconds >= 5 * 0.3  # what the sleeps alone took


@pytest.mark.parametrize("method", ["sd", "tomesd", "agentsd"])
def test_what_a_step_raises_ends_the_run_and_leaves_the_model(pipe, method):
    class Enough(Exception):
        pass

    def stop(step):
        if step.number == 2:
            raise Enough

    expected = pixels(generate(pipe, REQUEST, method))
    with pytest.raises(Enough):
        generate(pipe, REQUEST, method, None, stop)
    assert get_patch(pipe) is None and not hasattr(pipe.unet, "_tome_info")
    assert np.array_equal(pixels(generate(pipe, REQUEST, method)), expected)


@pytest.mark.parametrize("scheduler", [PNDMScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler, LCMScheduler])
@pytest.mark.parametrize(
    "early, phases",
    [(0.4, [Phase.AGENT, Phase.MERGE]), (0.01, [Phase.AGENT, Phase.MERGE]), (0.99, [Phase.AGENT, Phase.MERGE]),
     (0.0, [Phase.MERGE]), (1.0, [Phase.AGENT])],
)  # fmt: skip
def test_warm_up_calls_the_unet_once_per_phase_in_use(scheduler, early, phases):
    pipe = make_pipeline(scheduler=scheduler(**SD_BETAS))
    seen = []

    def record(module, args):
        patch = get_patch(pipe)
        seen.append(patch and patch.call.phase)

    handle = find_layers(pipe.unet, AgentConfig())[0][0].block.register_forward_pre_hook(record)
    steps = []
    before = pipe.scheduler
    warm_up(pipe, Request("a", steps=50), "agentsd", AgentConfig(early=early), steps.append)
    assert seen == phases and [step.total for step in steps] == [len(phases)] * len(phases)
    seen.clear()
    warm_up(pipe, Request("a", steps=50), "sd", AgentConfig(early=early))
    assert seen == [None] and pipe.scheduler is before and get_patch(pipe) is None
    handle.remove()


def test_an_interrupted_warm_up_leaves_the_pipeline(pipe):
    before = pipe.scheduler

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm_up(pipe, REQUEST, "agentsd", None, stop)
    assert pipe.scheduler is before and get_patch(pipe) is None


def test_warm_up_with_step_caching_makes_whole_and_cached_calls_in_each_phase(pipe):
    config = AgentConfig(cache_interval=3)
    assert warm_up_timesteps(config, 1000) == [999, 998, 1, 0]
    assert warm_up_timesteps(None, 1000) == [999]
    seen = []

    def record(step):
        call = get_patch(pipe).last_call
        seen.append((call.phase.value, call.cached))

    warm_up(pipe, REQUEST, "agentsd", config, record)
    assert seen == [("agent", False), ("agent", True), ("merge", False), ("merge", True)]


def test_runs_of_one_image_are_collected():
    image = Image.new("RGB", (8, 8))
    one = GeneratedImage("sd", image, (1.0,), {}, 5).with_run(GeneratedImage("sd", image, (3.0,), {}, 9))
    assert (one.all_seconds, one.peak_bytes) == ((1.0, 3.0), 9)
    unknown = GeneratedImage("sd", image, (1.0,), {}).with_run(GeneratedImage("sd", image, (3.0,), {}))
    assert unknown.peak_bytes is None


def test_the_end_of_a_prompt_that_is_not_read(pipe):
    assert unread_part(pipe, "a zebra") == ""
    assert unread_part(pipe, " ".join(["zebra"] * 75)) == ""
    assert unread_part(pipe, " ".join(["zebra"] * 75 + ["castle", "frog"])) == "castle frog"
    assert unread_part(object(), "a zebra") == ""


def test_damaged_images(tmp_path):
    path = tmp_path / "a.png"
    save_image(Image.effect_noise((64, 64), 90), path, {"prompt": "a"})
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:20], whole[:-2000], whole.replace(b"IDAT", b"IDXT")):
        path.write_bytes(content)
        with pytest.raises(OSError, match="a.png: is no picture"):
            read_settings(path)
    info = PngInfo()
    info.add_itxt(METADATA_KEY, "[1, 2]")
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    with pytest.raises(ValueError, match="not a set of settings"):
        read_settings(path)
