"""generate.py: three methods from one seed, fair timing, and pictures that carry their settings."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from conftest import make_pipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import agentsd
from agentsd import AgentConfig
from agentsd.images.compare import GeneratedImage, are_stable, compare, comparison_image, generate, warm_up
from agentsd.images.methods import METHODS, use_method
from agentsd.images.png import METADATA_KEY, check_output, read_settings, save_image
from agentsd.images.request import Request, unread_part
from agentsd.patch import get_patch

REQUEST = Request("a zebra", steps=4, seed=3)


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


def pixels(drawing):
    return np.asarray(drawing.image)


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


def test_compare_warms_up_and_interleaves(pipe):
    order = []
    drawings = compare(pipe, REQUEST, rounds=2, on_round=lambda method, number: order.append((number, method)))
    assert order == [(number, method) for number in (0, 1, 2) for method in METHODS]
    assert [drawing.method for drawing in drawings] == list(METHODS)
    for drawing in drawings:
        assert len(drawing.all_seconds) == 2
        assert min(drawing.all_seconds) <= drawing.seconds <= max(drawing.all_seconds)
        assert np.array_equal(pixels(drawing), pixels(generate(pipe, REQUEST, drawing.method)))
    picture = comparison_image(drawings)
    for i, drawing in enumerate(drawings):
        left = 8 + i * (128 + 8)
        assert np.array_equal(np.asarray(picture)[8:136, left : left + 128], pixels(drawing))
    assert picture.height > 136 + 20 and (np.asarray(picture)[140:] < 128).any()  # there is a caption


def test_speed_up_is_over_the_first():
    image = Image.new("RGB", (64, 64))
    drawings = [
        GeneratedImage("sd", image, (4.0, 2.0, 3.0), {}),
        GeneratedImage("agentsd", image, (1.5,), {"patch": {"ratio": 0.4}}),
    ]
    assert drawings[0].seconds == 3.0
    from agentsd.images.compare import _timing

    assert _timing(drawings[0], drawings[0]) == "3.00 s"
    assert _timing(drawings[1], drawings[0]) == "1.50 s,  2.00x as fast"


def test_rough_times_are_called_rough():
    image = Image.new("RGB", (256, 64))
    for all_seconds, steady in [((2.0, 2.1), True), ((2.0, 3.0), False), ((2.0,), False)]:
        drawings = [GeneratedImage("sd", image, all_seconds, {}), GeneratedImage("tomesd", image, (1.0, 1.0), {})]
        assert are_stable(drawings) is steady
    rough = np.asarray(comparison_image([GeneratedImage("sd", image, (2.0,), {})]))
    clean = np.asarray(comparison_image([GeneratedImage("sd", image, (2.0, 2.0), {})]))
    assert (rough < 200).sum() > (clean < 200).sum()  # the caption says so too


def test_saved_picture_can_be_drawn_again_from_itself(pipe, tmp_path):
    config = AgentConfig(ratio=0.3, merge_stride=(2, 4), seed=7)
    drawing = generate(pipe, REQUEST, "agentsd", config)
    path = tmp_path / "zebra.png"
    save_image(drawing.image, path, drawing.settings)
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

    drawing = generate(pipe, REQUEST, "agentsd", None, slow)
    plain = generate(pipe, REQUEST, "agentsd")
    assert np.array_equal(pixels(drawing), pixels(plain))
    assert [step.number for step in steps] == [1, 2, 3, 4, 5] and {step.total for step in steps} == {5}  # PLMS
    assert [step.timestep for step in steps] == sorted((step.timestep for step in steps), reverse=True)
    assert steps[-1].latents.shape == (1, 4, 16, 16) and not torch.equal(steps[0].latents, steps[-1].latents)
    assert drawing.seconds < 5 * 0.3 + plain.seconds * 0.9  # the sleeps alone took 1.5 s


@pytest.mark.parametrize("method", ["sd", "tomesd", "agentsd"])
def test_what_a_step_raises_ends_the_drawing_and_leaves_the_model(pipe, method):
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


def test_warm_up_takes_few_steps(pipe):
    steps = []
    warm_up(pipe, Request("a", steps=50), "sd", None, steps.append)
    warm_up(pipe, Request("a", steps=2), "sd", None, steps.append)
    assert [step.total for step in steps] == [5] * 5 + [3] * 3


def test_runs_of_one_drawing_are_collected():
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


def test_damaged_pictures(tmp_path):
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
