"""Checkpoints in one file, in the layout of the original code: loaded offline, or refused with what to give instead."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import draw, make_pipeline
from original_layout import original_weights, save_single_file
from safetensors.torch import save_file

from agentsd import apply_patch, cli, load_pipeline
from agentsd.images.model_files import ModelError, check_config, check_model, read_checkpoint
from agentsd.images.png import read_settings


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture(scope="module")
def config(tmp_path_factory, pipe):
    """A pipeline's folder without any weights: tokenizer, scheduler and sizes."""
    folder = tmp_path_factory.mktemp("config") / "tiny"
    pipe.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, pipe):
    file = tmp_path_factory.mktemp("single") / "tiny-emaonly.safetensors"
    save_single_file(pipe, file)
    return file


def test_single_file_is_the_same_model_as_its_folder(checkpoint, config, pipe):
    again = load_pipeline(checkpoint, config=config, device="cpu", scheduler="ddim")
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(pipe, part).state_dict(), getattr(again, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert type(again.scheduler).__name__ == "DDIMScheduler" and again.name_or_path == str(checkpoint)
    pipe = load_pipeline(checkpoint, config=str(config), device="cpu", dtype="bf16")
    assert {getattr(pipe, part).dtype for part in ("unet", "vae", "text_encoder")} == {torch.bfloat16}
    assert draw(apply_patch(again, ratio=0.5), steps=2).isfinite().all()


def test_single_file_takes_the_folder_of_its_name_beside_it(checkpoint, config, pipe):
    beside = checkpoint.with_suffix("")
    beside.symlink_to(config, target_is_directory=True)
    try:
        again = load_pipeline(checkpoint, device="cpu")
    finally:
        beside.unlink()
    assert torch.equal(draw(again, steps=2), draw(pipe, steps=2))


def test_single_file_without_configuration_says_what_to_fetch_and_where_to_put_it(checkpoint):
    """Offline (the tests are), before anything large is read."""
    with pytest.raises(ModelError, match="could not be fetched from stable-diffusion-v1-5/stab") as caught:
        load_pipeline(checkpoint, device="cpu")
    fetching = re.search('`python -c "(.*)"`', str(caught.value))[1]
    fetched = {}
    exec(fetching.split("; ")[1], {"get": lambda *name, **options: fetched.update(options, name=name)})
    assert fetched["local_dir"] == "tiny-emaonly" and fetched["name"] == (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
    )
    assert "beside the file" in str(caught.value)
    assert "--model-config" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="could not be fetched from nobody/nothing"):
        load_pipeline(checkpoint, config="nobody/nothing", device="cpu")


def test_single_file_of_another_size_than_its_configuration(checkpoint, tmp_path):
    make_pipeline(block_out_channels=(64, 128)).save_pretrained(tmp_path / "other")
    with pytest.raises(
        ModelError, match="cannot be loaded as Stable Diffusion 1.x with the configuration in"
    ) as caught:
        load_pipeline(checkpoint, config=tmp_path / "other", device="cpu")
    assert "\n" not in str(caught.value)


def test_single_file_marked_as_predicting_the_velocity_does(pipe, config, tmp_path):
    save_single_file(pipe, tmp_path / "v.safetensors", v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    scheduler = load_pipeline(tmp_path / "v.safetensors", config=config, scheduler="ddim", device="cpu").scheduler
    assert scheduler.config.prediction_type == "v_prediction"


def test_single_file_by_the_command(capsys, checkpoint, config, tmp_path):
    arguments = ["generate", "a zebra", "--steps", "2", "--model", str(checkpoint), "-o", str(tmp_path / "a.png")]
    assert cli.main([*arguments, "--model-config", str(config)]) == 0
    assert read_settings(tmp_path / "a.png")["model"] == str(checkpoint)
    assert cli.main(arguments) == 2 and "could not be fetched" in capsys.readouterr().err
    assert cli.main(["info", "--model-config", str(config)]) == 2
    assert "belongs to a single-file checkpoint; demo has a configuration" in capsys.readouterr().err


def test_single_file_in_the_app_the_benchmark_and_dreambooth(checkpoint, config, tmp_path):
    """They have no option for the configuration: it lies beside the file."""
    from dreambooth.export import _trained_for
    from dreambooth.models import load_model as load_for_training
    from dreambooth.settings import DreamBoothSettings
    from playground.models import Models

    from eval.common.models import ModelSpec, load_model

    beside = checkpoint.with_suffix("")
    beside.symlink_to(config, target_is_directory=True)
    try:
        settings = DreamBoothSettings(
            model=str(checkpoint), instance_data_dir=tmp_path, instance_prompt="x", output_dir=tmp_path, resolution=64,
        )  # fmt: skip
        loaded = [load_for_training(settings).pipe, Models([str(checkpoint)]).get(str(checkpoint)).pipe]
        loaded.append(load_model(ModelSpec(model=str(checkpoint))))
    finally:
        beside.unlink()
    assert {pipe.name_or_path for pipe in loaded} == {str(checkpoint)}
    assert _trained_for(settings)["base_model"] == str(checkpoint.resolve())


def made_of(pipe, *prefixes, **more):
    return {name: tensor for name, tensor in original_weights(pipe).items() if name.startswith(prefixes)} | more


@pytest.mark.parametrize(
    "changed, name",
    [
        ({}, "Stable Diffusion 1.x"),
        ({"cond_stage_model.model.ln_final.bias": 3}, "Stable Diffusion 2.x"),
        ({"conditioner.embedders.0.transformer.a": 3}, "Stable Diffusion XL refiner"),
        ({"conditioner.embedders.0.a": 3, "conditioner.embedders.1.model.b": 3}, "Stable Diffusion XL"),
    ],
)
def test_the_architecture_is_read_from_the_header_of_a_single_file(pipe, tmp_path, changed, name):
    drop = ("cond_stage_model.",) if changed else ()
    weights = {key: tensor for key, tensor in original_weights(pipe).items() if not key.startswith(drop or "-")}
    save_file(weights | {key: torch.zeros(size) for key, size in changed.items()}, tmp_path / "a.safetensors")
    found = read_checkpoint(tmp_path / "a.safetensors")
    assert found.name == name and found.hub_id.count("/") == 1 and not found.v_prediction


def test_an_inpainting_checkpoint_is_known_by_its_channels(pipe, tmp_path):
    weights = original_weights(pipe) | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}
    save_file(weights, tmp_path / "a.safetensors")
    assert read_checkpoint(tmp_path / "a.safetensors").name == "Stable Diffusion 1.x inpainting"


def wrong_files(pipe, folder):
    """Files that are no checkpoint with all parts: name -> (file, what is said)."""
    lone = {"x": torch.zeros(3)}
    contents = {
        "lora": ({"lora_unet_down.weight": torch.zeros(3)}, "is a LoRA"),
        "diffusers lora": ({"unet.down.lora_A.weight": torch.zeros(3)}, "is a LoRA"),
        "controlnet": ({"control_model.time_embed.0.weight": torch.zeros(3)}, "is a ControlNet"),
        "transformer": ({"model.diffusion_model.double_blocks.0.a": torch.zeros(3)}, "is a model with a transformer"),
        "unet of diffusers": (dict(pipe.unet.state_dict()), "is one part of a model in diffusers' layout"),
        "no text encoder": (made_of(pipe, "model.", "first_stage"), "has no text encoder"),
        "no autoencoder": (made_of(pipe, "model.", "cond_stage"), "has no autoencoder"),
        "anything": (lone, "is no checkpoint of Stable Diffusion"),
        "empty": ({}, "is no checkpoint of Stable Diffusion"),
    }
    for name, (weights, message) in contents.items():
        file = folder / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, file)
        yield file, message
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    damaged = {
        "text": b"not weights", "none": b"", "long header": (2**60).to_bytes(8, "little") + b"{}",
        "no json": (4).to_bytes(8, "little") + b"{{{{", "a list": (2).to_bytes(8, "little") + b"[]",
        "cut short": len(header).to_bytes(8, "little") + header + b"1234",
        "no shape": (9).to_bytes(8, "little") + b'{"a": {}}',
    }  # fmt: skip
    for name, content in damaged.items():
        (folder / f"{name}.safetensors").write_bytes(content)
        yield folder / f"{name}.safetensors", "cut short" if name == "cut short" else "cannot be read as safetensors"
    for suffix in (".ckpt", ".pt", ".bin"):
        torch.save({"state_dict": lone}, folder / f"model{suffix}")
        yield folder / f"model{suffix}", "is a pickle, which can run code"
    (folder / "a.zip").write_bytes(b"PK")
    yield folder / "a.zip", "is a file of another kind"


def test_files_that_are_no_whole_checkpoint_are_refused_by_what_they_are(pipe, tmp_path):
    for file, message in wrong_files(pipe, tmp_path):
        with pytest.raises(ModelError, match=re.escape(message)) as caught:
            check_model(file)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
        with pytest.raises(ModelError):
            load_pipeline(file)


@pytest.mark.parametrize(
    "model, message",
    [
        ("v1-5-pruned-emaonly.safetensors", "there is no file 'v1-5-pruned-emaonly.safetensors'"),
        ("models/v1-5.ckpt", "there is no file 'models/v1-5.ckpt'"),
        ("./model", "there is no folder './model'"),
        ("a/b/c", "there is no folder 'a/b/c'"),
        ("two words", "there is no folder 'two words'"),
        (" ", "there is no folder ' '"),
    ],
)
def test_a_name_that_can_be_no_model_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, model, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=re.escape(message)):
        check_model(model)


def test_a_misspelt_name_of_a_file_that_lies_there_says_which_was_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v1-5.safetensors").touch()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "toon.safetensors").touch()
    for model, meant in [
        ("v15.safetensors", "v1-5.safetensors"),
        ("v1-5.safetensor", "v1-5.safetensors"),  # no name of the hub: it would be looked up there, in vain
        ("./v1-5", "v1-5.safetensors"),
        ("./model", "models"),
        ("models/tooon.safetensors", "models/toon.safetensors"),
    ]:
        with pytest.raises(ModelError, match=re.escape(f"{model!r} (did you mean {meant}?): give")):
            check_model(model)


def test_names_of_the_hub_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model in ("demo", "stable-diffusion-v1-5/stable-diffusion-v1-5", "gpt2", "runwayml/sd_1.5-x"):
        check_model(model)


def test_a_configuration_that_cannot_be_one(checkpoint, config):
    for wrong, error in (("./nowhere", ModelError), (checkpoint, ModelError), ("demo", ModelError)):
        with pytest.raises(error):
            check_config(wrong, checkpoint)
    with pytest.raises(ValueError, match="belongs to a single-file checkpoint"):
        check_config(config, config)


def test_a_single_file_is_checked_before_torch_is_imported(tmp_path):
    (tmp_path / "lora.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    code = (
        "import sys\nfrom agentsd.cli import main\n"
        "code = main(['generate', 'x', '-o', 'x.png', '--model', 'lora.safetensors'])\n"
        "assert code == 2 and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["lora.safetensors"]
