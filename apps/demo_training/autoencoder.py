"""Stage autoencoder: its training on crops of the images, and the latents that it gives to the stage unet."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from .icons import load_index
from .images import as_floats, training_images
from .models import build_autoencoder, seed_initial_weights, take_over
from .run import Run, announce, claim_folder, file_digest, require, training_settings
from .samples import as_grid, evenly
from .training import finish, read_metadata, train

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny


def autoencoder_stage(run: Run) -> None:
    """Train the autoencoder on crops of the images: autoencoder/weights.safetensors."""
    preset, folder = run.preset, run.out / "autoencoder"
    icons = load_index(run)
    claim_folder(folder, training_settings(run, "autoencoder") | {"data": file_digest(run.out / "data" / "index.json")})
    if (folder / "weights.safetensors").exists():
        return announce("autoencoder", "already done")

    seed_initial_weights(run, "autoencoder")
    model = build_autoencoder(preset).to(run.device)
    if run.grow_from:
        take_over(model, run.grow_from / "vae" / "diffusion_pytorch_model.safetensors")
    pixels = training_images(run, icons).to(run.device)
    shown = evenly(range(len(pixels)), 8)

    def loss_of(phase: int, generator: torch.Generator) -> Tensor:
        crops = random_crops(pixels, preset.autoencoder_batch, preset.autoencoder_crop, generator)
        with run.autocast():
            latents = model.encode(crops).latents
            noise = torch.randn(latents.shape, generator=generator).to(run.device)
            restored = model.decode(latents + preset.latent_noise * noise).sample
        return autoencoder_loss(restored.float(), crops, latents.float())

    def sample_grid() -> Image.Image:
        originals = as_floats(pixels[shown])
        return as_grid(torch.cat([originals, reconstruct(model, originals)]), columns=len(shown))

    steps, peaks = [preset.autoencoder_steps], [preset.autoencoder_lr]
    train(run, "autoencoder", {"model": model}, {}, steps, peaks, loss_of, sample_grid)

    if run.grow_from:  # the UNet knows the latents in that scale
        scaling = json.loads((run.grow_from / "vae" / "config.json").read_text())["scaling_factor"]
    else:
        scaling = 1 / encode_all(model, pixels).std().item()
    judged = pixels[evenly(range(len(pixels)), 64)]
    error = sum(
        (reconstruct(model, as_floats(batch)) - as_floats(batch)).square().sum().item() for batch in judged.split(8)
    )
    psnr = 10 * math.log10(4 / (error / judged.numel()))
    # One entry: safetensors writes several in random order, and later stages know this file by its digest.
    finish(folder, model.state_dict(), {"scaling_factor": repr(scaling)})
    announce("autoencoder", f"reconstructs the images with {psnr:.1f} dB PSNR")


def random_crops(pixels: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """`count` random square crops, half of them mirrored: [count, 3, size, size] in -1 … 1, from uint8 [P, 3, H, W]."""
    room = pixels.shape[-1] - size + 1
    picks = torch.randint(len(pixels), (count,), generator=generator).tolist()
    corners = torch.randint(room, (count, 2), generator=generator).tolist()
    mirrored = torch.rand(count, generator=generator).tolist()
    crops = []
    for pick, (top, left), mirror in zip(picks, corners, mirrored, strict=True):
        crop = pixels[pick, :, top : top + size, left : left + size]
        crops.append(crop.flip(-1) if mirror < 0.5 else crop)
    return as_floats(torch.stack(crops))


def autoencoder_loss(restored: Tensor, target: Tensor, latents: Tensor) -> Tensor:
    """L1 + 2 · MSE + half the L1 of the image gradients, and a small pull of the latents to mean 0 and deviation 1."""
    difference = restored - target
    rows, columns = difference.diff(dim=-2).abs().mean(), difference.diff(dim=-1).abs().mean()
    pull = latents.mean().square() + (latents.std() - 1).square()
    return difference.abs().mean() + 2 * difference.square().mean() + 0.5 * (rows + columns) / 2 + 0.01 * pull


@torch.no_grad()
def encode_all(model: AutoencoderTiny, pixels: Tensor) -> Tensor:
    """The unscaled latents of uint8 images [P, 3, H, W], in float32."""
    return torch.cat([model.encode(as_floats(batch)).latents for batch in pixels.split(8)])


@torch.no_grad()
def reconstruct(model: AutoencoderTiny, images: Tensor) -> Tensor:
    """Encode and decode images [B, 3, H, W] in -1 … 1."""
    return model.decode(model.encode(images).latents).sample.clamp(-1, 1)


def load_autoencoder(run: Run):
    """The finished autoencoder, in float32 on the CPU, with the scaling factor that gives its latents deviation 1."""
    path = require(run, run.out / "autoencoder" / "weights.safetensors", "autoencoder")
    model = build_autoencoder(run.preset, scaling_factor=float(read_metadata(path)["scaling_factor"]))
    model.load_state_dict(load_file(path))
    return model.requires_grad_(False).eval()
