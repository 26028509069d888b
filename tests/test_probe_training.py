"""eval/train_probe.py: the smoke preset end to end, killed and resumed, its gate, and bad input; the shipped probe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from demo_training import training
from safetensors.torch import load_file

from eval import train_probe as script
from eval.common.protocol import BenchError
from eval.denoising.judged import PROBE, PROBE_64, load_judged
from eval.denoising.patterns import SMOOTHING, pattern_images
from eval.probes import gate
from eval.probes.matching import matched_share
from eval.probes.training import PRESETS

ROOT = Path(__file__).parents[1]


def complete(*arguments) -> int:
    return script.main([*map(str, arguments)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("probe") / "out"
    assert complete("train", "--smoke", "--precision", "fp32", "--out", out) == 0
    return out


def test_the_model_is_in_diffusers_format(finished):
    judged = load_judged(str(finished / "model"), device="cpu")
    assert judged.is_probe and judged.pipe.unet.config.sample_size == 8
    assert torch.allclose(judged.signal[-1], torch.tensor(0.0047), atol=1e-4)  # Stable Diffusion's schedule


def test_a_killed_training_ends_with_the_same_weights(finished, tmp_path, monkeypatch):
    out, saved = tmp_path / "out", training.save_checkpoint

    def save_then_die(path, step, *rest):
        saved(path, step, *rest)
        if step == 4:  # in the second phase
            raise MemoryError("killed")

    arguments = ("train", "--smoke", "--precision", "fp32", "--checkpoint-seconds", 0, "--out", out)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(training, "save_checkpoint", save_then_die)
        complete(*arguments)
    assert not (out / "model").exists()
    assert complete(*arguments) == 0
    name = "model/unet/diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(out / name), load_file(finished / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_training_starts_from_another_probe_and_keeps_its_scale(finished, tmp_path, monkeypatch, capsys):
    larger = replace(PRESETS["smoke"], sides=(8, 12), scale=1.5, phases=(1, 1), peak_lrs=(0.0, 0.0))
    monkeypatch.setitem(PRESETS, "smoke", larger)
    arguments = ("train", "--smoke", "--precision", "fp32", "--start-from", finished / "model", "--out", tmp_path)
    assert complete(*arguments) == 0
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(finished / "model" / name), load_file(tmp_path / "model" / name)
    assert all(torch.equal(before[key], after[key]) for key in before)  # at a learning rate of 0
    judged = load_judged(str(tmp_path / "model"), device="cpu")
    assert judged.pipe.unet.config.sample_size == 12 and judged.scale == 1.5
    patterns = gate.load_inputs(judged, None, None, 2, 7).latents
    assert torch.equal(patterns, pattern_images(7, range(2), 12, 1.5))

    assert complete("train", "--smoke", "--precision", "fp32", "--out", tmp_path) == 2
    assert "was made with another started_from" in capsys.readouterr().err
    monkeypatch.setitem(PRESETS, "smoke", replace(larger, channels=(16, 16)))
    assert complete(*arguments[:-1], tmp_path / "other") == 2
    assert "other layers or channels" in capsys.readouterr().err
    assert complete("train", "--smoke", "--start-from", tmp_path / "none", "--out", tmp_path / "third") == 2
    assert "give the folder of a probe" in capsys.readouterr().err
    (tmp_path / "model" / "patterns.json").write_text('{"scale": "large"}')
    with pytest.raises(BenchError, match="scale 'large' must be a number from 1"):
        load_judged(str(tmp_path / "model"), device="cpu")


def test_the_best_matching_is_sharp_without_noise_and_uniform_in_it():
    images = pattern_images(0, range(3), 24)
    sharp, blurred, lost = (matched_share(images, signal, 7, SMOOTHING) for signal in (0.9, 0.1, 1e-5))
    assert 1 / 18**2 <= sharp < 0.05 < blurred < lost and lost > 0.99
    assert matched_share(images, 0.1, 11, SMOOTHING) < blurred  # a larger window knows more


def test_an_untrained_network_fails_the_gate(finished, monkeypatch, capsys):
    monkeypatch.setattr(gate, "TIMESTEPS", (100, 900))
    assert complete("gate", "--samples", 4, "--out", finished) == 0
    found = json.loads((finished / "gate.json").read_text())
    assert not found["passed"] and [row["timestep"] for row in found["rows"]] == [100, 900]
    assert all(1 <= keys <= 64 == row["tokens"] for row in found["rows"] for keys in row["keys"].values())
    assert "Gate: not passed, 0 of 2" in capsys.readouterr().out


def test_bad_input_is_told(finished, tmp_path, capsys):
    def told(*arguments):
        assert complete(*arguments) == 2
        return capsys.readouterr().err

    assert "was made with another seed" in told(
        "train", "--smoke", "--precision", "fp32", "--seed", 1, "--out", finished
    )
    assert "cannot be loaded" in told("gate", "--out", tmp_path / "empty")
    assert "--device moon is not available" in told("train", "--smoke", "--device", "moon", "--out", tmp_path)
    assert "--samples 1: must be at least 2" in told("gate", "--samples", 1, "--out", finished)


@pytest.mark.parametrize(
    ("name", "folder", "tokens", "samples"), [("probe", PROBE, 576, 16), ("probe-64", PROBE_64, 4096, 3)]
)
def test_the_shipped_probes_need_their_attention_and_are_small(name, folder, tokens, samples):
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 4 << 20
    judged = load_judged(name, device="cpu")
    row = gate._row(judged, gate.load_inputs(judged, None, None, samples, 5), 390)
    assert row["mean-value"][0] > 0.25 and row["no-attention"][0] > 0.5
    assert min(row["keys"].values()) < tokens / 4 and row["tokens"] == tokens
