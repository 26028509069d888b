"""apps/train_demo_model.py as a user runs it: the smoke preset end to end, killed and resumed, and with bad input."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).resolve().parents[1] / "apps" / "train_demo_model.py"
# One thread: the order of a sum over threads is the only thing that could tell two runs on one CPU apart.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=300, check=False
    )


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
def script():
    """The script as a module, for its functions."""
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of an undisturbed smoke run."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run("--smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def test_smoke_run_exports_a_pipeline_that_draws(finished):
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


def test_pictures_grids_and_contact_sheet_are_left_to_look_at(finished):
    index = json.loads((finished / "data" / "index.json").read_text())
    assert sorted(row["name"] for row in index) == ["basketball", "door", "lemon", "tent"]
    for path in ("autoencoder/grids/step_000040.png", "unet/grids/step_000060.png", "samples.png"):
        assert (finished / path).read_bytes().startswith(b"\x89PNG")
    assert not list(finished.rglob("checkpoint.safetensors")), "a finished stage keeps no checkpoint"
    assert not list(finished.rglob("*.part"))


def test_a_killed_run_goes_on_to_the_same_weights(finished, tmp_path):
    out = tmp_path / "out"
    everything = ("--smoke", "--out", out, "--checkpoint-seconds", 0)
    kill_at(out / "autoencoder" / "checkpoint.safetensors", *everything)
    assert not (out / "autoencoder" / "weights.safetensors").exists()
    # In the second phase of the UNet, whose start replaces weights and optimiser: after the grid of step 30.
    kill_at(out / "unet" / "grids" / "step_000030.png", *everything)
    assert not (out / "unet" / "weights.safetensors").exists()
    done = run(*everything)
    assert done.returncode == 0, done.stderr
    assert "data: already done" in done.stdout
    assert "autoencoder: already done" in done.stdout

    for stage in ("autoencoder", "unet"):
        resumed = load_file(out / stage / "weights.safetensors")
        undisturbed = load_file(finished / stage / "weights.safetensors")
        assert resumed.keys() == undisturbed.keys()
        for key, value in undisturbed.items():
            assert torch.equal(resumed[key], value), f"{stage}: {key}"


def test_an_interrupted_run_says_so_and_keeps_its_steps(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        command("autoencoder", "--smoke", "--out", prepared_data(out), "--checkpoint-seconds", 0),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (out / "autoencoder" / "checkpoint.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command goes on from here" in errors
    assert (out / "autoencoder" / "checkpoint.safetensors").exists()


def prepared_data(out: Path) -> Path:
    assert run("data", "--smoke", "--out", out).returncode == 0
    return out


def fails_with(status: subprocess.CompletedProcess[str]) -> str:
    """The one sentence that a refused command ends with."""
    assert status.returncode == 2, status.stderr
    assert "Traceback" not in status.stderr
    return status.stderr.strip().splitlines()[-1]


def test_other_settings_are_refused(finished):
    sentence = fails_with(run("unet", "--smoke", "--out", finished, "--seed", 1))
    assert "another seed (0, not 1)" in sentence


def test_without_npm_and_icons_it_names_the_packages(tmp_path):
    sentence = fails_with(run("data", "--out", tmp_path / "out", PATH=str(tmp_path)))
    assert "npm is not installed" in sentence
    assert "@iconify-json/noto" in sentence
    assert "--icons" in sentence


def test_unknown_preset_names_the_known_ones(tmp_path):
    sentence = fails_with(run("--preset", "huge", "--out", tmp_path / "out"))
    assert "first" in sentence
    assert "smoke" in sentence


def test_a_folder_that_cannot_be_written_is_refused(script, tmp_path, capsys):
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
def test_what_cannot_work_is_said_in_a_sentence(script, tmp_path, capsys, arguments, sentence):
    assert script.main([*arguments, "--smoke", "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err


def icon_set(**icons: dict) -> dict:
    return {"prefix": "noto", "icons": icons, "width": 8, "height": 8}


def test_icon_files_that_do_not_fit_are_refused(script, tmp_path, capsys):
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


def test_icons_are_read_from_npm_packages_without_variants(script, tmp_path):
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

    read = script.icons_by_caption(script.read_icon_set(tmp_path / "noto.tgz"))
    assert sorted(read) == ["astronaut", "hot dog", "traffic light"]
    assert 'viewBox="0 0 9 8"><a/></svg>' in read["hot dog"]


def test_icons_are_rasterised_centred_in_their_own_proportions(script):
    pytest.importorskip("resvg_py")
    svg = script.icons_by_caption(icon_set(bar={"body": '<path fill="#f00" d="M0 0h4v8H0z"/>', "width": 4}))["bar"]
    picture = script.compose_picture(script.rasterise(svg, 100), 50)
    pixels = np.asarray(picture)
    assert pixels.shape == (50, 50, 3)
    assert tuple(pixels[25, 25]) == (255, 0, 0)
    assert tuple(pixels[25, 5]) == tuple(pixels[25, 44]) == (255, 255, 255)
    assert tuple(pixels[0, 25]) == (255, 255, 255), "the margin"


def test_vocabulary_keeps_every_word_whole(script):
    words = ["ball", "basketball", "banana", "pineapple", "apple", "a", "an"]
    vocabulary, merges = script.build_vocabulary(words)
    ranks = {pair: number for number, pair in enumerate(merges)}
    for word in words:
        assert script.split_word(word, ranks) == [word + "</w>"]
        assert word + "</w>" in vocabulary
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert set(script.split_word("xyz", ranks)) <= vocabulary.keys()


def test_first_preset_is_the_published_model(script):
    assert len(script.CLEAR_NAMES) == len(set(script.CLEAR_NAMES)) == 121
    assert len(set(script.CLEAR_NAMES + script.OTHER_NAMES)) == 178
    preset = script.PRESETS["first"]
    names = script.trained_names(preset)
    vocabulary, _ = script.build_vocabulary([*script.EXTRA_WORDS, *(w for name in names for w in name.split())])
    assert len(vocabulary) == 1290
    assert sum(p.numel() for p in script.build_unet(preset).parameters()) == 9_525_412
    assert sum(p.numel() for p in script.build_autoencoder(preset).parameters()) == 1_003_495


def test_learning_rate_warms_up_and_ends_near_zero(script):
    rates = [script.learning_rate(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def test_loss_weight_is_the_clamped_inverse_root_of_the_signal_to_noise_ratio(script):
    alphas = torch.tensor([0.9999, 0.5, 0.2, 0.0001])  # SNR = ᾱ / (1 - ᾱ): 9999, 1, 1/4, 1/9999
    assert torch.allclose(script.loss_weight(alphas), torch.tensor([0.15, 1.0, 2.0, 6.0]))
