"""The app's settings: what is asked for is checked by name, and comes back from a saved image or a link."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from urllib.parse import urlencode

import numpy as np
import pytest
from app_support import tiny_models
from conftest import make_pipeline
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo
from playground import restore as app_restore
from playground import settings as app_settings
from playground import sweeps
from playground.restore import form_values, link_values, restore
from playground.script import script
from playground.settings import (
    OWN_SCHEDULER,
    PATCH_FIELDS,
    RECOMMENDED,
    SWEEPABLE,
    Field,
    Limits,
    check,
    check_patch,
    sweep_values,
)

from agentsd import AgentConfig
from agentsd.images.generate import GeneratedImage, generate, settings_of
from agentsd.images.pipelines import set_scheduler
from agentsd.images.png import METADATA_KEY, save_image
from agentsd.images.request import Request

MODELS = ("demo", "other")
PRESETS = {"paper": {}, "toy": {"ratio": 0.5, "agent_stride": (2, 4), "max_agents": 64}}
LIMITS = Limits()


def test_only_the_prompt_is_needed():
    settings = check({"prompt": "a zebra"}, MODELS, LIMITS)
    assert settings.model == "demo" and settings.scheduler == RECOMMENDED and settings.rounds == 3
    assert settings.request == Request("a zebra", steps=25, guidance=5.0)
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
    assert len(set(names)) == len(names) and "seed" not in names  # the image's
    assert check_patch({field.name: field.default for field in PATCH_FIELDS.values()}) == AgentConfig()
    json.dumps([field.default for field in PATCH_FIELDS.values()])  # as the API tells them


CONFIG = AgentConfig(
    ratio=0.3, early=0.7, agent_stride=(2, 4), merge_stride=(2, 3), max_downsample=2, upcast=True, seed=9,
    use_rand=False, merge_mlp=True,
)  # fmt: skip


def test_a_saved_image_gives_its_settings_back(tmp_path):
    pipe = make_pipeline()
    request = Request("斑马 “zèbre”", "blurry", 7, 4.5, 11, 64, 128)
    about = settings_of(pipe, request, "agentsd", CONFIG)
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", {**about, "model": "other", "scheduler_name": "unipc"})
    values, remarks = restore(tmp_path / "a.png", MODELS, LIMITS)
    settings = check(values, MODELS, LIMITS)
    assert remarks == []
    assert (settings.model, settings.scheduler) == ("other", "unipc")
    assert settings.request == request and settings.config == CONFIG


def test_images_of_the_command_give_theirs_back(tmp_path):
    pipe = make_pipeline()
    about = {**settings_of(pipe, Request("a", steps=3), "agentsd", CONFIG), "model": "demo"}
    plain = {**settings_of(pipe, Request("a", steps=3), "sd", CONFIG), "model": "demo"}
    save_image(Image.new("RGB", (8, 8)), tmp_path / "all.png", {"compare": [plain, about]})
    values, _ = restore(tmp_path / "all.png", MODELS, LIMITS)
    assert check(values, MODELS, LIMITS).config == CONFIG and values["scheduler"] == "plms"
    values, _ = form_values(plain, MODELS, LIMITS)
    assert check(values, MODELS, LIMITS).config == AgentConfig()


def test_what_an_image_cannot_have_is_said():
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
        (lambda p: p.write_bytes(b"no image at all"), "that can be read"),
        (lambda p: p.write_bytes(b""), "that can be read"),
        (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 60), "that can be read"),
        (lambda p: _png(p, "{}", cut=400), "that can be read, or a damaged one"),
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
def test_a_bad_image_is_refused(tmp_path, make, message):
    path = tmp_path / "bad.png"
    make(path)
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        restore(path, MODELS, LIMITS)


def test_an_image_of_too_many_pixels_is_refused_before_they_are_decoded(tmp_path, monkeypatch):
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


@pytest.mark.parametrize("size, values", [(64, 2), (64, 4), (64, 6), (64, 9), (512, 4), (1024, LIMITS.values)])
def test_every_image_of_the_app_has_few_enough_pixels(size, values):
    generated = [GeneratedImage("sd", Image.new("RGB", (size, size)), (1.0,), {})] * (values + 1)
    rows = [sweeps.SweepRow(value, 1.0, 1.0, 0.0, 99.0) for value in (None, *range(values))]
    sheet = sweeps.sweep_sheet("ratio", rows, generated)
    assert sheet.width * sheet.height <= Limits(largest=size, values=values).pixels


def test_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    inside, most = [], []

    def read(path):
        inside.append(path)
        most.append(len(inside))
        time.sleep(0.05)
        inside.remove(path)
        return {"prompt": "a", "model": "demo"}

    monkeypatch.setattr(app_restore, "read_settings", read)
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
        (("seed", 0, 1, 3), f"field='seed': must be one of {', '.join(SWEEPABLE)}"),
        (("ratio", 0, 1, 1), "count=1: must be an integer in 2 … 9"),
        (("ratio", 0, 1, 100), "count=100"),
        (("ratio", None, 1, 3), "first: is empty; must be a number"),
        (("ratio", 0, float("inf"), 3), "last=inf"),
        (("ratio", 0.3, 0.3, 3), "must differ"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            sweep_values(*arguments, LIMITS)


def test_an_integer_field_is_swept_over_integers(monkeypatch):
    monkeypatch.setitem(PATCH_FIELDS, "alpha", Field("alpha", int, 1))
    found = sweep_values("alpha", 1, 4, 4, LIMITS)
    assert found == [1, 2, 3, 4] and all(isinstance(value, int) for value in found)
    assert sweep_values("alpha", 1, 8, 3, LIMITS) == [1, 4, 8]
    with pytest.raises(ValueError, match="count=4: there are fewer integers from 1 to 3"):
        sweep_values("alpha", 1, 3, 4, LIMITS)


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["", "?", "?__theme=dark", "?view=api&__lang=en"])
def test_an_address_without_settings_gives_none(query):
    assert link_values(query, MODELS, LIMITS) == ({}, [])


def test_a_link_gives_settings_by_name_or_as_json():
    query = "?prompt=a+castle%2C%2050%25&seed=7&guidance=4.5&use_rand=false&agent_stride=2x4&ratio=0.3&width=&rounds=2"
    values, remarks = link_values(query, MODELS, LIMITS)
    assert remarks == []
    settings = check(values, MODELS, LIMITS)
    assert settings.request == Request("a castle, 50%", steps=25, seed=7, guidance=4.5) and settings.rounds == 2
    assert settings.config == AgentConfig(ratio=0.3, agent_stride=(2, 4), use_rand=False)
    assert values["use_rand"] is False and isinstance(values["seed"], int)  # as the form's controls take them
    as_json = json.dumps({"seed": 7, "ratio": 0.3, "negative_prompt": "a & b"})
    values, remarks = link_values("?" + urlencode({"settings": as_json, "__theme": "light"}), MODELS, LIMITS)
    assert values == json.loads(as_json) and remarks == []


@pytest.mark.parametrize(
    "query, message",
    [
        ("?seed=-7", "seed=-7: must be"),
        ("?seed=abc", "seed='abc': must be an integer"),
        ("?steps=2.5", "steps=2.5: must be an integer"),
        ("?guidance=nan", "guidance=nan"),
        ("?ratio=high", "ratio='high'"),
        ("?use_rand=perhaps", "use_rand='perhaps'"),
        ("?width=4096", "width=4096"),
        ("?model=/etc", "model='/etc': must be one this app was started with"),
        ("?seed=1&seed=2", "'seed': is given twice"),
        ("?settings={", "settings='{': is not JSON"),
        ("?settings=[1]", "is not in the form that this app writes"),
        ("?settings=" + "[" * 100_000, "is not JSON"),
        ('?settings={"seed":-1}', "seed=-1"),
        ("?" + "&".join(f"a{i}=1" for i in range(200)), "more than 100 parameters"),
    ],
)
def test_a_bad_link_is_refused_by_name(query, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        link_values(query, MODELS, LIMITS)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("query", ["?sed=7&seed=3", '?settings={"sed":7,"seed":3}', "?sed&seed=3"])
def test_unknown_parameters_of_a_link_are_named_and_the_others_used(query):
    values, remarks = link_values(query, MODELS, LIMITS)
    assert values == {"seed": 3} and "does not know were left out: 'sed'" in " ".join(remarks)


def test_a_preset_sets_its_fields_and_others_win(monkeypatch):
    monkeypatch.setattr(app_settings, "PRESETS", PRESETS)
    values, remarks = link_values("?preset=toy&alpha=0.2&prompt=a", MODELS, LIMITS)
    settings = check(values, MODELS, LIMITS)
    assert settings.config == AgentConfig(ratio=0.5, agent_stride=(2, 4), max_agents=64, alpha=0.2) and remarks == []
    with pytest.raises(ValueError, match="preset='fats': must be one of paper, toy"):
        link_values("?preset=fats", MODELS, LIMITS)
    assert app_settings.preset_of(AgentConfig()) == "paper" and app_settings.preset_of(settings.config) is None
    toy = check({"prompt": "a", **app_settings.preset_values("toy")}, MODELS, LIMITS)
    assert app_settings.preset_of(toy.config) == "toy" and 'apply_patch(pipe, preset="toy")' in script(toy)
    assert "preset" not in script(check({"prompt": "a"}, MODELS, LIMITS))


# --- the script -------------------------------------------------------------------------------------------------------


def test_the_script_generates_the_same_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'mo"del'
    make_pipeline().save_pretrained(folder)
    values = {
        "prompt": 'a "zebra" \\ 斑马', "negative_prompt": "blurry", "steps": 3, "seed": 5, "model": str(folder),
        "scheduler": "ddim", "width": 64, "ratio": 0.3, "agent_stride": "2x4", "upcast": "True", "patch_seed": 4,
    }  # fmt: skip
    settings = check(values, [str(folder)], LIMITS)
    code = script(settings, "ddim")
    assert "agentsd.apply_patch(pipe, ratio=0.3, agent_stride=(2, 4), seed=4, upcast=True)" in code
    exec(compile(code, "script", "exec"), {})
    models = tiny_models(str(folder))
    pipe = models.get(str(folder)).pipe
    set_scheduler(pipe, "ddim")
    expected = generate(pipe, settings.request, "agentsd", settings.config).image
    assert np.array_equal(np.asarray(Image.open("image.png")), np.asarray(expected))


def test_the_script_says_only_what_is_not_the_default():
    code = script(check({"prompt": "a"}, MODELS, LIMITS))
    assert "apply_patch(pipe, ratio=0.4)\n" in code and "scheduler" not in code and "negative" not in code
