"""train_stage: train the probe on patterns that never repeat, from its last checkpoint if there is one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_training.run import Run, UsageError, announce, claim_folder, file_digest
from demo_training.training import finish, train
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from eval.denoising.patterns import SIDE, pattern_images

from .network import TEXT_SIZE, export, make_scheduler, make_unet

TRAINING_SEED_SHIFT = 1 << 32
"""Seed of the training images, less the run's: no image of an evaluation, whose seeds are smaller, is trained on."""


@dataclass(frozen=True)
class ProbePreset:
    """Size and schedule of a training; field names as demo_training's loop reads them.

    Attributes:
        sides, batches, phases, peak_lrs: of each phase: image side, images a step, steps, and peak learning rate. The
            network is made for the last side.
        decay_steps: steps that each phase's learning rate would need to fall to 0; None: as many as the phase has.
        scale: of the patterns, see `pattern_images`.
        most_weight: the largest weight of a timestep's loss; the larger, the more the noisiest timesteps count.
    """

    channels: tuple[int, int]
    sides: tuple[int, ...]
    batches: tuple[int, ...]
    phases: tuple[int, ...]
    peak_lrs: tuple[float, ...]
    decay_steps: tuple[int, ...] | None = None
    scale: float = 1.0
    most_weight: float = 4.0
    warmup_steps: int = 50
    ema_decay: float = 0.995
    grid_steps: int = 1 << 30


PRESETS = {
    "cpu": ProbePreset((40, 80), (SIDE, SIDE), (16, 16), (1000, 1000), (3e-3, 2e-3)),
    # One cosine from 2e-3 to 0 in two parts: the cheap small images first, until it has fallen to about the half.
    "cpu-64": ProbePreset(
        (40, 80),
        (48, 64),
        (8, 4),
        (500, 350),
        (2e-3, 1e-3),
        decay_steps=(900, 350),
        scale=2.0,
        most_weight=12.0,
        ema_decay=0.99,
    ),  # fmt: skip
    "smoke": ProbePreset((8, 16), (8, 8), (4, 4), (3, 3), (1e-3, 1e-3), warmup_steps=1),
}


def train_stage(run: Run) -> Path:
    """Train, or go on training, and export to the folder `model`. Returns that folder.

    Raises:
        UsageError: the folder was made with other settings, or the probe to start from has another size.
    """
    preset: Any = run.preset
    folder, model = run.out / "probe", run.out / "model"
    settings = {"preset": run.preset_name, "seed": run.seed, "precision": run.precision}
    torch.manual_seed(run.generator("weights").initial_seed())
    unet = make_unet(preset.channels, preset.sides[-1])
    if run.grow_from:
        settings["started_from"] = _start_from(run.grow_from, unet)
    claim_folder(folder, settings)
    weights = folder / "weights.safetensors"
    if not weights.exists():
        trained = unet.to(run.device).train()
        average = copy.deepcopy(trained).eval().requires_grad_(False)
        loss_of = _Loss(run, trained)
        train(
            run, "probe", {"unet": trained}, {"unet": average}, preset.phases, preset.peak_lrs, loss_of,
            lambda: Image.new("L", (1, 1)), decay_steps=preset.decay_steps,
        )  # fmt: skip
        finish(folder, average.state_dict(), {})
    unet.load_state_dict(load_file(weights))
    export(unet.cpu().eval(), model, preset.scale)
    announce("train", f"{sum(p.numel() for p in unet.parameters()):,} parameters in {model}")
    return model


def _start_from(start: Path, unet: torch.nn.Module) -> str:
    """Fill the network with the weights of a probe of any image side. Returns the digest of their file."""
    file = start / "unet" / "diffusion_pytorch_model.safetensors"
    if not file.is_file():
        raise UsageError(f"--start-from {start}: has no {file.relative_to(start)}: give the folder of a probe")
    try:
        unet.load_state_dict(load_file(file))
    except RuntimeError:
        raise UsageError(
            f"--start-from {start}: its network has other layers or channels than the preset's: give a probe that the "
            "same channels were trained for"
        ) from None
    return file_digest(file)


class _Loss:
    """The weighted error of the predicted noise of one batch of new images."""

    def __init__(self, run: Run, unet: torch.nn.Module):
        preset: Any = run.preset
        self.run, self.unet = run, unet
        self.scheduler = make_scheduler()
        signal = self.scheduler.alphas_cumprod
        # Between the losses of noise and of image: with equal weights, noisy timesteps hardly count, as their noise is
        # easily seen.
        self.weights = ((1 - signal) / signal).sqrt().clamp(0.4, preset.most_weight).to(run.device)

    def __call__(self, phase: int, generator: torch.Generator) -> Tensor:
        preset: Any = self.run.preset
        size = preset.batches[phase]
        first = int(torch.randint(1 << 40, (), generator=generator))
        numbers = range(first, first + size)
        images = pattern_images(TRAINING_SEED_SHIFT + self.run.seed, numbers, preset.sides[phase], preset.scale)
        noise = torch.randn(images.shape, generator=generator)
        spread = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        timesteps = (spread * len(self.scheduler)).long().clamp(max=len(self.scheduler) - 1)
        noisy = self.scheduler.add_noise(images, noise, timesteps).to(self.run.device)
        text = torch.zeros(size, 1, TEXT_SIZE, device=self.run.device)
        with self.run.autocast():
            predicted = self.unet(noisy, timesteps.to(self.run.device), text).sample
        error = (predicted.float() - noise.to(self.run.device)).square().mean(dim=(1, 2, 3))
        return (error * self.weights[timesteps]).mean()
