"""The app's settings: what is asked for is checked by name, and comes back from a saved picture."""

from __future__ import annotations

import dataclasses
import json
import threading
import time

import numpy as np
import pytest
from app_support import tiny_models
from conftest import make_pipeline
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo
from playground import pictures
from playground import settings as app_settings
from playground.settings import (
    OWN_SCHEDULER,
    PATCH_FIELDS,
    Limits,
    check,
    check_patch,
    form_values,
    patch_help,
    restore,
    script,
    sweep_values,
)

from agentsd import AgentConfig
from agentsd.images.compare import GeneratedImage, generate, settings_of
from agentsd.images.pipelines import set_scheduler
from agentsd.images.png import METADATA_KEY, save_image
from agentsd.images.request import Request

MODELS = ("demo", "other")
LIMITS = Limits()


def test_only_the_prompt_is_needed():
    settings = check({"prompt": "a zebra"}, MODELS, LIMITS)
    assert settings.model == "demo" and settings.scheduler == OWN_SCHEDULER and settings.rounds == 1
    assert settings.request == Request("a zebra", steps=20, guidance=5.0)
    assert settings.config == AgentConfig()


def test_numbers_as_a_browser_sends_them():
    values = {"prompt": "a", "steps": 7.0, "seed": 3.0, "width": 128.0, "height": 0, "rounds": 2.0, "patch_seed": 5.0}
    settings = check({**values, "negative_prompt": None, "guidance": None}, MODELS, LIMITS)
    assert settings.request == Request("a", steps=7, seed=3, width=128, guidance=5.0)
    assert isinstance(settings.request.steps, int) and settings.rounds == 2 and settings.config.seed == 5


@pytest.mark.parametrize(
    "values, message",
    [
        ({"prompt": ""}, "prompt: is empty"),
        ({"prompt": " \n "}, "prompt: is empty"),
        ({"prompt": None}, "prompt: is empty"),
        ({"prompt": "x" * 10_000}, "prompt: has 10,000 characters; must have at most 2,000"),
        ({"negative_prompt": "x" * 10_000}, "negative_prompt: has 10,000"),
        ({"steps": 0}, "steps=0: must be an integer in 1 … 150"),
        ({"steps": 151}, "steps=151: must be"),
        ({"steps": 2.5}, "steps=2.5: must be"),
        ({"steps": "many"}, "steps='many': must be"),
        ({"width": 100}, "width=100: must be a multiple of 8"),
        ({"width": 1032}, "width=1032: must be an integer in 64 … 1024"),
        ({"height": 8}, "height=8: must be an integer in 64"),
        ({"height": -64}, "height=-64: must be"),
        ({"seed": -1}, "seed=-1"),
        ({"guidance": 1000}, "guidance=1000"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"rounds": 99}, "rounds=99: must be an integer in 1 … 5"),
        ({"model": "/etc"}, "model='/etc': must be one this app was started with: demo, other"),
        ({"scheduler": "magic"}, "scheduler='magic': must be .*plms"),
        ({"ratio": 1.5}, "ratio=1.5"),
        ({"ratio": 0.8}, "ratio=0.8: at most 0.75"),
        ({"early": -1}, "early=-1"),
        ({"agent_stride": "4x"}, "agent_stride='4x'"),
        ({"agent_stride": "__import__('os')"}, "agent_stride="),
        ({"max_downsample": "3"}, "max_downsample=3"),
        ({"upcast": "perhaps"}, "upcast='perhaps'"),
        ({"use_rand": "yes"}, "use_rand='yes'"),
    ],
)
def test_what_is_out_of_bounds_is_named(values, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        check({"prompt": "a zebra", **values}, MODELS, LIMITS)
    assert len(str(error.value)) < 400  # the page shows it


def test_every_setting_of_the_patch_has_a_field():
    assert list(PATCH_FIELDS) == [field.name for field in dataclasses.fields(AgentConfig)]
    names = [field.name for field in PATCH_FIELDS.values()]
    assert len(set(names)) == len(names) and "seed" not in names  # the picture's
    assert check_patch({field.name: field.default for field in PATCH_FIELDS.values()}) == AgentConfig()
    assert set(PATCH_FIELDS) <= set(patch_help()) and patch_help()["seed"] == "of those draws"
    json.dumps([field.default for field in PATCH_FIELDS.values()])  # as the API tells them


CONFIG = AgentConfig(
    ratio=0.3, early=0.7, agent_stride=(2, 4), merge_stride=(2, 3), max_downsample=2, upcast=True, seed=9,
    use_rand=False, merge_mlp=True,
)  # fmt: skip


def test_a_saved_picture_gives_its_settings_back(tmp_path):
    pipe = make_pipeline()
    request = Request("斑马 “zèbre”", "blurry", 7, 4.5, 11, 64, 128)
    about = settings_of(pipe, request, "agentsd", CONFIG)
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", {**about, "model": "other", "scheduler_name": "unipc"})
    values, remarks = restore(tmp_path / "a.png", MODELS, LIMITS)
    settings = check(values, MODELS, LIMITS)
    assert remarks == []
    assert (settings.model, settings.scheduler) == ("other", "unipc")
    assert settings.request == request and settings.config == CONFIG


def test_pictures_of_the_command_give_theirs_back(tmp_path):
    pipe = make_pipeline()
    about = {**settings_of(pipe, Request("a", steps=3), "agentsd", CONFIG), "model": "demo"}
    plain = {**settings_of(pipe, Request("a", steps=3), "sd", CONFIG), "model": "demo"}
    save_image(Image.new("RGB", (8, 8)), tmp_path / "all.png", {"compare": [plain, about]})
    values, _ = restore(tmp_path / "all.png", MODELS, LIMITS)
    assert check(values, MODELS, LIMITS).config == CONFIG and values["scheduler"] == "plms"
    values, _ = form_values(plain, MODELS, LIMITS)
    assert check(values, MODELS, LIMITS).config == AgentConfig()


def test_what_a_picture_cannot_have_is_said():
    about = {"prompt": "a", "model": "evil/model", "scheduler": "SomeScheduler", "patch": {"ratio": 0.2, "new": 1}}
    values, remarks = form_values(about, MODELS, LIMITS)
    assert values["model"] == "demo" and values["scheduler"] == OWN_SCHEDULER and values["ratio"] == 0.2
    assert [word in " ".join(remarks) for word in ("evil/model", "SomeScheduler", "new")] == [True] * 3


def _png(path, text=None, cut=None):
    info = PngInfo()
    if text is not None:
        info.add_itxt(METADATA_KEY, text)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, pnginfo=info)
    if cut:
        path.write_bytes(path.read_bytes()[:cut])
    return path


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: p.write_bytes(b"no picture at all"), "is no picture that can be read"),
        (lambda p: p.write_bytes(b""), "is no picture that can be read"),
        (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 60), "is no picture that can be read"),
        (lambda p: _png(p, "{}", cut=400), "is no picture that can be read, or a damaged one"),
        (lambda p: _png(p), "carries no settings"),
        (lambda p: _png(p, "not json"), "is not JSON"),
        (lambda p: _png(p, "[" * 100_000), "is not JSON"),
        (lambda p: _png(p, "[1]"), "not a set of settings"),
        (lambda p: _png(p, "{}"), "prompt: is empty"),
        (lambda p: _png(p, '{"compare": [1]}'), "not in the form"),
        (lambda p: _png(p, '{"prompt": "a", "patch": [1]}'), "not in the form"),
        (lambda p: _png(p, '{"prompt": "a", "model": "demo", "steps": 100000}'), "steps=100000"),
        (lambda p: _png(p, '{"prompt": "a", "model": {"a": 1}, "patch": {"ratio": "x"}}'), "ratio='x'"),
    ],
)
def test_a_bad_picture_is_refused(tmp_path, make, message):
    path = tmp_path / "bad.png"
    make(path)
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        restore(path, MODELS, LIMITS)


def test_a_picture_of_too_many_pixels_is_refused_before_they_are_decoded(tmp_path, monkeypatch):
    info = PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps({"prompt": "a", "model": "demo"}))
    path = tmp_path / "huge.png"
    Image.new("1", (8000, 4000)).save(path, pnginfo=info)
    assert path.stat().st_size < 10_000

    def load(image):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ValueError, match="huge.png: is 8,000 × 4,000 px; .* at most 20,971,520 pixels"):
        restore(path, MODELS, LIMITS)
    with pytest.raises(AssertionError, match="decoded"):
        restore(_png(tmp_path / "small.png", "{}"), MODELS, LIMITS)


@pytest.mark.parametrize("size", [64, 512, 1024])
def test_every_picture_of_the_app_has_few_enough_pixels(size):
    for values in (2, 4, 6, LIMITS.values):
        drawings = [GeneratedImage("sd", Image.new("RGB", (size, size)), (1.0,), {})] * (values + 1)
        rows = pictures.sweep_rows([None, *range(values)], drawings)
        sheet = pictures.sweep_sheet("ratio", rows, drawings)
        assert sheet.width * sheet.height <= Limits(largest=size, values=values).pixels


def test_pictures_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    inside, most = [], []

    def read(path):
        inside.append(path)
        most.append(len(inside))
        time.sleep(0.05)
        inside.remove(path)
        return {"prompt": "a", "model": "demo"}

    monkeypatch.setattr(app_settings, "read_settings", read)
    paths = [_png(tmp_path / f"{i}.png") for i in range(4)]
    threads = [threading.Thread(target=restore, args=(path, MODELS, LIMITS)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_sweep_values():
    assert sweep_values("ratio", 0.1, 0.7, 4.0, LIMITS) == [0.1, 0.3, 0.5, 0.7]
    assert sweep_values("early", 1, 0, 2, LIMITS) == [1, 0]
    for arguments, message in [
        (("seed", 0, 1, 3), "field='seed': must be one of ratio, early, alpha"),
        (("ratio", 0, 1, 1), "count=1: must be an integer in 2 … 9"),
        (("ratio", 0, 1, 100), "count=100"),
        (("ratio", None, 1, 3), "first: is empty; must be a number"),
        (("ratio", 0, float("inf"), 3), "last=inf"),
        (("ratio", 0.3, 0.3, 3), "must differ"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            sweep_values(*arguments, LIMITS)


def test_the_script_draws_the_same_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'mo"del'
    make_pipeline().save_pretrained(folder)
    values = {
        "prompt": 'a "zebra" \\ 斑马', "negative_prompt": "blurry", "steps": 3, "seed": 5, "model": str(folder),
        "scheduler": "ddim", "width": 64, "ratio": 0.3, "agent_stride": "2x4", "upcast": "True", "patch_seed": 4,
    }  # fmt: skip
    settings = check(values, [str(folder)], LIMITS)
    code = script(settings)
    assert "agentsd.apply_patch(pipe, ratio=0.3, agent_stride=(2, 4), seed=4, upcast=True)" in code
    exec(compile(code, "script", "exec"), {})
    models = tiny_models(str(folder))
    pipe = models.get(str(folder)).pipe
    set_scheduler(pipe, "ddim")
    expected = generate(pipe, settings.request, "agentsd", settings.config).image
    assert np.array_equal(np.asarray(Image.open("picture.png")), np.asarray(expected))


def test_the_script_says_only_what_is_not_the_default():
    code = script(check({"prompt": "a"}, MODELS, LIMITS))
    assert "apply_patch(pipe, ratio=0.4)\n" in code and "scheduler" not in code and "negative" not in code
