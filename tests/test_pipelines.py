"""pipelines.py and the built-in model: it loads offline and generates what it should, and others load as well."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw, make_pipeline
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import agentsd
from agentsd.images.pipelines import DEMO_MODEL, SCHEDULERS, ModelError, load_pipeline, set_scheduler


@pytest.fixture(scope="module")
def demo():
    pipe = load_pipeline("demo")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_demo_model_is_in_stable_diffusions_format(demo):
    assert type(demo) is StableDiffusionPipeline
    assert type(demo.unet).__name__ == "UNet2DConditionModel"
    assert demo.unet.dtype == torch.float32 and demo.unet.config.in_channels == 4
    assert type(demo.scheduler).__name__ == "PNDMScheduler"
    files = [path for path in DEMO_MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32e6
    assert {path.suffix for path in files if path.stat().st_size > 200_000} == {".safetensors"}
    assert (DEMO_MODEL / "README.md").is_file()  # the model card


def test_demo_model_generates_what_it_is_asked_for(demo):
    """Colours tell: a strawberry is red, a frog is green, on a light ground; agent attention keeps the image."""

    def image(prompt):
        return np.asarray(draw(demo, steps=6, prompt=prompt, output_type="pil")[0], dtype=float)

    before = demo.scheduler
    try:
        set_scheduler(demo, "dpm++2m")  # 6 of its steps are enough
        for prompt, channel in (("a high quality photograph of a strawberry.", 0), ("a frog", 1)):
            plain = image(prompt)
            assert plain.shape == (512, 512, 3)
            corner, thing = plain[:20, :20].mean(), plain[156:356, 156:356].mean(axis=(0, 1))
            assert corner > 200 and thing.argmax() == channel and thing.max() > 1.1 * np.median(thing)
        with agentsd.patched(demo):
            psnr = 10 * np.log10(255**2 / ((plain - image(prompt)) ** 2).mean())
        assert 25 < psnr < 60  # not the same image, but the same thing in the same place
    finally:
        demo.scheduler = before


def test_demo_text_encoder_has_the_names_every_transformers_reads():
    """Without the prefix transformers 4 silently starts from random weights, and the prompt means nothing."""
    names = load_file(DEMO_MODEL / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)


def test_demo_model_does_not_depend_on_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert load_pipeline().unet is not None


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(demo, name):
    before = demo.scheduler
    try:
        set_scheduler(demo, name)
        assert demo.scheduler.config.beta_schedule == "scaled_linear"
        assert demo.scheduler.config.num_train_timesteps == 1000
        assert demo.scheduler.config.get("use_karras_sigmas", False) is name.endswith("-karras")
        out = draw(demo, steps=3, height=64, width=64)
        assert torch.isfinite(torch.as_tensor(out)).all()
        set_scheduler(demo, "dpm++2m-karras")
        set_scheduler(demo, "dpm++2m")
        assert demo.scheduler.config.use_karras_sigmas is False
    finally:
        demo.scheduler = before


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_latents_are_not_clipped_like_images(demo, name):
    before = demo.scheduler
    try:
        set_scheduler(demo, name)
        demo.scheduler.set_timesteps(4)
        # A prediction of no noise: the image is the latent over the root of ᾱ, far beyond ±1, and must stay there.
        step = demo.scheduler.step(torch.zeros(1, 4, 8, 8), demo.scheduler.timesteps[-1], torch.full((1, 4, 8, 8), 3.0))
        assert step.pred_original_sample.min() > 2.9
    finally:
        demo.scheduler = before


def test_a_named_scheduler_is_what_it_says_whatever_was_left_at_its_default():
    pipe = make_pipeline()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert "use_karras_sigmas" in pipe.scheduler.config["_use_default_values"]
    set_scheduler(pipe, "dpm++2m-karras")
    assert pipe.scheduler.config.use_karras_sigmas is True
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, use_exponential_sigmas=True, use_karras_sigmas=False
    )
    set_scheduler(pipe, "dpm++2m-karras")
    assert pipe.scheduler.config.use_karras_sigmas is True and pipe.scheduler.config.use_exponential_sigmas is False


@pytest.mark.parametrize("where", ["component", "pipeline", "nameless"])
def test_code_in_a_models_folder_is_never_run(tmp_path, where):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    make_pipeline().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    code = f"open({str(ran)!r}, 'w')\nclass X: pass\n"
    if where == "component":
        index["unet"] = ["evil", "X"]
        (folder / "unet" / "evil.py").write_text(code)
    elif where == "pipeline":
        index["_class_name"] = ["evil", "X"]
        (folder / "evil.py").write_text(code)
    else:
        (folder / "None.py").write_text(code)
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="is the model's own code"):
        load_pipeline(folder, device="cpu")
    assert not ran.exists()


def test_any_saved_folder_loads(tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    again = load_pipeline(tmp_path / "model", dtype="float32", device="cpu", scheduler="ddim")
    assert torch.equal(again.unet.conv_in.weight, pipe.unet.conv_in.weight)
    half = load_pipeline(str(tmp_path / "model"), dtype="bf16")
    assert half.unet.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    make_pipeline().save_pretrained(folder)
    return folder


def test_pickled_weights_are_refused(saved, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(saved, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(make_pipeline().unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match="save it again as safetensors"):
        load_pipeline(folder)


def test_what_cannot_be_loaded_is_one_clear_sentence(saved, tmp_path, monkeypatch):
    damaged = tmp_path / "damaged"
    shutil.copytree(saved, damaged)
    (damaged / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    (tmp_path / "empty").mkdir()
    for name, content in (("nameless", "{}"), ("list", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(content)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "toon.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    for model, message in [
        (damaged, "cannot be loaded"),
        ("empty", "without model_index.json"),
        ("nameless", "model_index.json names no pipeline class"),
        ("list", "model_index.json names no pipeline class"),
        ("a.png", "is a file"),
        ("./missing", "there is no folder './missing'"),
        ("no such model!", "there is no folder"),
        ("", "there is no folder ''"),
        ("toon", r"toon is not a folder here \(did you mean toon.safetensors\?\) and could not be fetched"),
        ("nobody/nothing", "nobody/nothing is not a folder here and could not be fetched from the Hugging Face hub"),
    ]:
        with pytest.raises(ModelError, match=message) as caught:
            load_pipeline(model)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"scheduler": "plsm"}, "scheduler='plsm'.*plms"),
        ({"scheduler": "DPM++ 2M Karras"}, r"did you mean dpm\+\+2m-karras"),
        ({"scheduler": "dpmpp_2m"}, r"did you mean dpm\+\+2m\?"),
        ({"scheduler": "Euler a"}, r"did you mean euler-a\?"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"device": "abacus"}, "device='abacus'"),
        ({"device": "cuda"}, "not available to torch"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        load_pipeline("demo", **arguments)


def test_demo_folder_is_part_of_the_package():
    assert Path(agentsd.__file__).parent in DEMO_MODEL.parents
