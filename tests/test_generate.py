"""generate.py: three methods from one seed, fair timing, and pictures that carry their settings."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from conftest import make_pipeline
from PIL import Image

import agentsd
from agentsd import AgentConfig
from agentsd.generate import (
    METHODS,
    Drawing,
    Request,
    are_steady,
    check_output,
    compare,
    comparison_picture,
    draw,
    read_settings,
    save_picture,
    use_method,
)
from agentsd.patch import get_patch

REQUEST = Request("a zebra", steps=4, seed=3)


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


def pixels(drawing):
    return np.asarray(drawing.image)


def test_methods_differ_and_repeat_exactly(pipe):
    first = {method: draw(pipe, REQUEST, method) for method in METHODS}
    torch.manual_seed(99)  # ToMeSD left alone would follow the global generator
    second = {method: draw(pipe, REQUEST, method) for method in reversed(METHODS)}
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
        assert np.array_equal(pixels(drawing), pixels(draw(pipe, REQUEST, drawing.method)))
    picture = comparison_picture(drawings)
    for i, drawing in enumerate(drawings):
        left = 8 + i * (128 + 8)
        assert np.array_equal(np.asarray(picture)[8:136, left : left + 128], pixels(drawing))
    assert picture.height > 136 + 20 and (np.asarray(picture)[140:] < 128).any()  # there is a caption


def test_speed_up_is_over_the_first():
    image = Image.new("RGB", (64, 64))
    drawings = [Drawing("sd", image, (4.0, 2.0, 3.0), {}), Drawing("agentsd", image, (1.5,), {"patch": {"ratio": 0.4}})]
    assert drawings[0].seconds == 3.0
    from agentsd.generate import _timing

    assert _timing(drawings[0], drawings[0]) == "3.00 s"
    assert _timing(drawings[1], drawings[0]) == "1.50 s,  2.00x as fast"


def test_rough_times_are_called_rough():
    image = Image.new("RGB", (256, 64))
    for all_seconds, steady in [((2.0, 2.1), True), ((2.0, 3.0), False), ((2.0,), False)]:
        drawings = [Drawing("sd", image, all_seconds, {}), Drawing("tomesd", image, (1.0, 1.0), {})]
        assert are_steady(drawings) is steady
    rough = np.asarray(comparison_picture([Drawing("sd", image, (2.0,), {})]))
    clean = np.asarray(comparison_picture([Drawing("sd", image, (2.0, 2.0), {})]))
    assert (rough < 200).sum() > (clean < 200).sum()  # the caption says so too


def test_saved_picture_can_be_drawn_again_from_itself(pipe, tmp_path):
    config = AgentConfig(ratio=0.3, merge_stride=(2, 4), seed=7)
    drawing = draw(pipe, REQUEST, "agentsd", config)
    path = tmp_path / "zebra.png"
    save_picture(drawing.image, path, drawing.settings)
    settings = read_settings(path)
    fields = {name: settings[name] for name in Request.__dataclass_fields__}
    patch = {k: tuple(v) if isinstance(v, list) else v for k, v in settings["patch"].items()}
    again = draw(pipe, Request(**fields), settings["method"], AgentConfig(**patch))
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
    save_picture(Image.new("RGB", (4, 4)), tmp_path / "a.png", {"prompt": "斑马 “zèbre” 🦓"})
    assert read_settings(tmp_path / "a.png") == {"prompt": "斑马 “zèbre” 🦓"}
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    assert read_settings(tmp_path / "b.png") is None


def test_a_failed_save_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.png"
    save_picture(Image.new("RGB", (4, 4), "red"), path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_picture(Image.new("RGB", (4, 4)), path, {"not": object()})

    class Broken(Image.Image):
        def save(self, *args, **kwargs):
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_picture(Broken(), path)
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
        draw(plain, REQUEST, method)
    assert draw(plain, REQUEST, "sd").image.size == (128, 128)


def test_unknown_method(pipe):
    with pytest.raises(ValueError, match="method='magic': must be one of sd, tomesd, agentsd"):
        draw(pipe, REQUEST, "magic")
