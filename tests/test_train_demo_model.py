"""apps/train_demo_model.py as a user runs it: the smoke preset end to end, killed and resumed, and with bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import train_demo_model as script
from demo_training import training
from demo_training.icons import icons_by_caption, rasterise, read_icon_set
from demo_training.images import compose_image
from demo_training.presets import PRESETS
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).resolve().parents[1] / "apps" / "train_demo_model.py"

DEMO_MODEL = SCRIPT.parents[1] / "agentsd" / "demo_model"
# One thread: the order of a sum over threads is the only thing that could tell two runs on one CPU apart.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def complete(*arguments: object) -> None:
    """Run the script in this process, on the CPU and one thread as a child process would."""
    assert script.main([*map(str, arguments), "--device", "cpu"]) == 0


def kill_at(file: Path, *arguments: object) -> None:
    """Starts the script and kills it, as a crash would, as soon as `file` exists."""
    process = subprocess.Popen(
        command(*arguments), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not file.exists():
            assert process.poll() is None, f"it ended before {file} was there"
            time.sleep(0.01)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of an undisturbed smoke run."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    complete("--smoke", "--out", out)
    return out


@pytest.fixture(scope="module")
def grown(finished, tmp_path_factory) -> Path:
    """The folder of an undisturbed run that grew from the smoke run's model, on coloured grounds."""
    out = tmp_path_factory.mktemp("grown") / "out"
    complete("--preset", "smoke-grown", "--grow-from", finished / "model", "--out", out, "--count", 2)
    return out


def test_smoke_run_exports_a_pipeline_that_works(finished):
    from diffusers import AutoencoderTiny, PNDMScheduler, StableDiffusionPipeline

    files = {str(path.relative_to(finished / "model")) for path in (finished / "model").rglob("*") if path.is_file()}
    assert files >= {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    for file in files:
        if file.endswith(".safetensors"):
            assert {tensor.dtype for tensor in load_file(finished / "model" / file).values()} == {torch.float16}

    names = load_file(finished / "model" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)  # or transformers 4 starts from random weights

    pipeline = StableDiffusionPipeline.from_pretrained(finished / "model", safety_checker=None).to(torch.float32)
    assert isinstance(pipeline.vae, AutoencoderTiny)
    assert isinstance(pipeline.scheduler, PNDMScheduler)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a high quality photograph of a lemon.",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0.01


def test_words_of_the_names_are_single_tokens(finished):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(finished / "model" / "tokenizer")
    row = tokenizer("A high quality photograph of a basketball.", padding="max_length").input_ids
    assert len(row) == 77
    words = [token for token in tokenizer.convert_ids_to_tokens(row) if not token.startswith("<|")]
    assert [word.removesuffix("</w>") for word in words] == "a high quality photograph of a basketball .".split()


def test_icons_grids_and_contact_sheet_are_left_to_look_at(finished):
    index = json.loads((finished / "data" / "index.json").read_text())
    assert sorted(row["name"] for row in index) == ["basketball", "door", "lemon", "tent"]
    for path in ("autoencoder/grids/step_000020.png", "unet/grids/step_000030.png", "samples.png"):
        assert (finished / path).read_bytes().startswith(b"\x89PNG")
    assert not list(finished.rglob("checkpoint.safetensors")), "a finished stage keeps no checkpoint"
    assert not list(finished.rglob("*.part")) and not list(finished.rglob("*.tmp"))


def test_an_interrupted_and_killed_run_goes_on_to_the_same_weights(finished, tmp_path, capsys, monkeypatch):
    out, saved = tmp_path / "out", training.save_checkpoint
    everything = ("--smoke", "--out", out)
    at_once = ("--checkpoint-seconds", 0)

    def save_and_press_ctrl_c(path, step, *rest):
        saved(path, step, *rest)
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", save_and_press_ctrl_c)
        assert script.main([*map(str, everything + at_once), "--device", "cpu"]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert (out / "autoencoder" / "checkpoint.safetensors").exists()
    assert not (out / "autoencoder" / "weights.safetensors").exists()
    # In the second phase of the UNet, whose start replaces weights and optimiser: after the grid of step 15.
    kill_at(out / "unet" / "grids" / "step_000015.png", *everything, *at_once)
    assert not (out / "unet" / "weights.safetensors").exists()
    capsys.readouterr()
    complete(*everything)
    told = capsys.readouterr().out
    assert "data: already done" in told
    assert "autoencoder: already done" in told

    for stage in ("autoencoder", "unet"):
        resumed = load_file(out / stage / "weights.safetensors")
        undisturbed = load_file(finished / stage / "weights.safetensors")
        assert resumed.keys() == undisturbed.keys()
        for key, value in undisturbed.items():
            assert torch.equal(resumed[key], value), f"{stage}: {key}"


def refused(capsys, *arguments: object) -> str:
    """The sentence of a command that is refused."""
    assert script.main([*map(str, arguments)]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_other_settings_are_refused(finished, capsys):
    assert "another seed (0, not 1)" in refused(capsys, "unet", "--smoke", "--out", finished, "--seed", 1)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", ["export", "samples"])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], 'another preset ("smoke", not "first")'),
        (["--smoke", "--seed", "1"], "another seed (0, not 1)"),
        (["--smoke", "--precision", "fp32"], 'another precision ("bf16", not "fp32")'),
    ],
)
def test_what_was_trained_with_other_settings_is_left_as_it_is(finished, capsys, stage, arguments, sentence):
    before = contents(finished)
    assert script.main([stage, *arguments, "--out", str(finished)]) == 2
    assert f"{finished / 'unet'} was made with {sentence}" in capsys.readouterr().err
    assert contents(finished) == before


@pytest.mark.parametrize("stage", ["export", "samples"])
def test_what_grew_from_another_model_is_left_as_it_is(finished, grown, tmp_path, capsys, stage):
    before = contents(grown)
    other = tmp_path / "other"
    shutil.copytree(finished / "model", other)
    vocabulary = json.loads((other / "tokenizer" / "vocab.json").read_text())
    first, second, *_ = vocabulary  # as large, but two tokens have changed places
    vocabulary |= {first: vocabulary[second], second: vocabulary[first]}
    (other / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    preset = ("--preset", "smoke-grown", "--out", str(grown), "--count", "2")
    assert script.main([stage, *preset, "--grow-from", str(other)]) == 2
    assert f"{grown / 'unet'} was made with another grown_from" in capsys.readouterr().err
    assert script.main([stage, "--smoke", "--out", str(grown)]) == 2
    assert "another preset" in capsys.readouterr().err
    assert contents(grown) == before


def test_an_export_of_other_data_or_another_autoencoder_is_refused(finished, tmp_path, capsys):
    for part in ("data/index.json", "autoencoder/weights.safetensors"):
        out = tmp_path / part.partition("/")[0]
        shutil.copytree(finished, out)
        if part.endswith(".json"):
            (out / part).write_text(json.dumps(json.loads((out / part).read_text())[:3]))
        else:
            tensors = load_file(out / part)
            save_file({key: value + 1 for key, value in tensors.items()}, out / part, {"scaling_factor": "1.0"})
        before = contents(out)
        assert script.main(["export", "--smoke", "--out", str(out)]) == 2
        assert f"another {out.name}" in capsys.readouterr().err
        assert contents(out) == before


def test_samples_need_the_model_alone(finished, tmp_path):
    shutil.copytree(finished / "model", tmp_path / "out" / "model")
    assert script.main(["samples", "--smoke", "--out", str(tmp_path / "out"), "--count", "1"]) == 0
    shutil.copytree(finished / "unet", tmp_path / "out" / "unet")  # without the data that it was trained on
    assert script.main(["samples", "--smoke", "--out", str(tmp_path / "out"), "--count", "1"]) == 0


def test_without_npm_and_icons_it_names_the_packages(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    sentence = refused(capsys, "data", "--out", tmp_path / "out")
    assert "npm is not installed" in sentence
    assert "@iconify-json/noto" in sentence
    assert "--icons" in sentence


def test_unknown_preset_names_the_known_ones(tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        script.main(["--preset", "huge", "--out", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert raised.value.code == 2 and "first" in told and "smoke" in told


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert script.main(["data", "--smoke", "--out", str(file / "out")]) == 2
    assert f"--out {file / 'out'} cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["unet"], "run the stage autoencoder"),
        (["autoencoder"], "run the stage data"),
        (["export"], "run the stage unet"),
        (["samples"], "run the stage export"),
        (["data", "--icons", "absent.tgz"], "absent.tgz is not a file"),
        (["data", "--device", "toaster"], "--device toaster is not available"),
        (["samples", "--count", "0"], "at least 1"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(tmp_path, capsys, arguments, sentence):
    assert script.main([*arguments, "--smoke", "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err


def icon_set(**icons: dict) -> dict:
    return {"prefix": "noto", "icons": icons, "width": 8, "height": 8}


def test_icon_files_that_do_not_fit_are_refused(tmp_path, capsys):
    broken = tmp_path / "broken.tgz"
    broken.write_bytes(b"no archive")
    assert script.main(["data", "--smoke", "--out", str(tmp_path / "out"), "--icons", str(broken)]) == 2
    assert "neither an npm package" in capsys.readouterr().err

    lemon_only = tmp_path / "icons.json"
    lemon_only.write_text(json.dumps(icon_set(lemon={"body": "<path/>"})))
    assert script.main(["data", "--smoke", "--out", str(tmp_path / "out2"), "--icons", str(lemon_only)]) == 2
    assert "no icon named 'basketball'" in capsys.readouterr().err
    assert script.main(["data", "--out", str(tmp_path / "out3"), "--icons", str(lemon_only)]) == 2
    assert "also needs @iconify-json/fluent-emoji" in capsys.readouterr().err


def test_icons_are_read_from_npm_packages_without_variants(tmp_path):
    icons = {
        "hot-dog": {"body": "<a/>", "width": 9},
        "astronaut": {"body": "<b/>"},
        "astronaut-medium-dark": {"body": "<c/>"},
        "astronaut-dark-skin-tone": {"body": "<d/>"},
        "traffic-light": {"body": "<e/>"},
        "old": {"body": "<f/>", "hidden": True},
    }
    source = tmp_path / "icons.json"
    source.write_text(json.dumps(icon_set(**icons)))
    with tarfile.open(tmp_path / "noto.tgz", "w:gz") as archive:
        archive.add(source, "package/icons.json")

    read = icons_by_caption(read_icon_set(tmp_path / "noto.tgz"))
    assert sorted(read) == ["astronaut", "hot dog", "traffic light"]
    assert 'viewBox="0 0 9 8"><a/></svg>' in read["hot dog"]


def test_icons_are_rasterised_centred_in_their_own_proportions():
    pytest.importorskip("resvg_py")
    svg = icons_by_caption(icon_set(bar={"body": '<path fill="#f00" d="M0 0h4v8H0z"/>', "width": 4}))["bar"]
    pixels = np.asarray(compose_image(rasterise(svg, 100), 50, margin=0.04))
    assert pixels.shape == (50, 50, 3)
    assert tuple(pixels[25, 25]) == (255, 0, 0)
    assert tuple(pixels[25, 5]) == tuple(pixels[25, 44]) == (255, 255, 255)
    assert tuple(pixels[0, 25]) == (255, 255, 255), "the margin"


# ------------------------------------------------------------------------------------- a grown model from end to end


def test_a_grown_model_works_and_keeps_what_it_came_from(finished, grown):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(grown / "model", safety_checker=None).to(torch.float32)
    assert list(pipeline.unet.config.block_out_channels) == [16, 16, 32]
    assert list(pipeline.unet.config.only_cross_attention) == [False, True, True]
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a lemon", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()

    for file in ("vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt"):
        assert (grown / "model" / file).read_bytes() == (finished / "model" / file).read_bytes()
    # The text encoder is trained on from where it was, not from random weights.
    before, after = (load_file(folder / "model" / "text_encoder" / "model.safetensors") for folder in (finished, grown))
    key = "text_model.embeddings.token_embedding.weight"
    assert 0 < (after[key].float() - before[key].float()).abs().max() < 0.2
    # Its last phase sharpens the self-attention, one projection for queries and keys, and trains only the others.
    layers = [m for name, m in pipeline.unet.named_modules() if name.endswith("attn1") and not m.is_cross_attention]
    assert len(layers) == 3
    for layer in layers:
        assert torch.equal(layer.to_q.weight, layer.to_k.weight)
        assert 0 < (layer.to_v.weight - torch.eye(16)).abs().max() < 0.2
    assert (grown / "unet" / "grids" / "step_000018.png").exists()
    assert (grown / "samples.png").exists()


def test_a_killed_growing_goes_on_to_the_same_bytes(finished, grown, tmp_path, monkeypatch):
    out = tmp_path / "out"
    everything = ("--preset", "smoke-grown", "--grow-from", finished / "model", "--out", out, "--count", 2)
    saved = training.save_checkpoint

    def save_then_die(path, step, *rest):
        saved(path, step, *rest)
        if step == 13:
            raise MemoryError("killed")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(training, "save_checkpoint", save_then_die)
        complete(*everything, "--checkpoint-seconds", 0)
    assert (out / "unet" / "grids" / "step_000012.png").exists()
    assert not (out / "unet" / "weights.safetensors").exists()
    complete(*everything)
    assert (out / "unet" / "weights.safetensors").read_bytes() == (grown / "unet" / "weights.safetensors").read_bytes()


def test_growing_needs_a_model_that_fits(finished, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    assert "give its folder with --grow-from" in refused(capsys, "data", "--preset", "smoke-grown", *out)
    absent = refused(capsys, "data", "--preset", "smoke-grown", "--grow-from", tmp_path, *out)
    assert f"({tmp_path} is none)" in absent
    assert "starts from random weights" in refused(capsys, "data", "--smoke", "--grow-from", finished / "model", *out)
    grow_from_demo = ("--preset", "smoke-grown", "--grow-from", DEMO_MODEL)
    complete("data", *grow_from_demo, *out)
    assert "of another format" in refused(capsys, "autoencoder", *grow_from_demo, *out)


def test_icon_sets_are_rasterised_for_training(tmp_path):
    pytest.importorskip("resvg_py")
    files = []
    for prefix in ("fluent-emoji", "noto"):
        icons = {name: {"body": '<path fill="#c00" d="M0 0h4v8H0z"/>'} for name in PRESETS["smoke"].phases[0].names}
        files.append(tmp_path / f"{prefix}.json")
        files[-1].write_text(json.dumps(icon_set(**icons) | {"prefix": prefix}))
    out = tmp_path / "out"
    complete("data", "--smoke", "--out", out, "--icons", *files)
    rows = json.loads((out / "data" / "index.json").read_text())
    assert len(rows) == 8 and {row["style"] for row in rows} == {"fluent-emoji", "noto"}
    assert all((out / "data" / row["file"]).is_file() for row in rows)
