"""Stage autoencoder: its training on crops of the pictures, and the latents that it gives to the stage unet."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from .icons import Picture, load_index
from .models import build_autoencoder, seed_initial_weights, take_over
from .pictures import CanvasSet, as_floats, load_pictures
from .presets import SHARD
from .run import Run, announce, claim_folder, file_digest, replacing, require, training_settings
from .samples import as_grid, evenly
from .training import finish, read_metadata, train


def autoencoder_stage(run: Run) -> None:
    """Trains the autoencoder on crops of the pictures: autoencoder/weights.safetensors."""
    preset, folder = run.preset, run.out / "autoencoder"
    pictures = load_index(run)
    claim_folder(folder, training_settings(run, "autoencoder") | {"data": file_digest(run.out / "data" / "index.json")})
    if (folder / "weights.safetensors").exists():
        return announce("autoencoder", "already done")

    seed_initial_weights(run, "autoencoder")
    model = build_autoencoder(preset).to(run.device)
    if run.grow_from:
        take_over(model, run.grow_from / "vae" / "diffusion_pytorch_model.safetensors")
    if preset.canvases:
        pixels = CanvasSet(run, pictures, "autoencoder").pixels(range(preset.autoencoder_canvases))
    else:
        pixels = load_pictures(run, pictures)
    pixels = pixels.to(run.device)
    shown = evenly(range(len(pixels)), 8)

    def loss_of(phase: int, generator: torch.Generator) -> Tensor:
        crops = random_crops(pixels, preset.autoencoder_batch, preset.autoencoder_crop, generator)
        with run.autocast():
            latents = model.encode(crops).latents
            noise = torch.randn(latents.shape, generator=generator).to(run.device)
            restored = model.decode(latents + preset.latent_noise * noise).sample
        return autoencoder_loss(restored.float(), crops, latents.float())

    def draw_grid() -> Image.Image:
        originals = as_floats(pixels[shown])
        return as_grid(torch.cat([originals, reconstruct(model, originals)]), columns=len(shown))

    steps, peaks = [preset.autoencoder_steps], [preset.autoencoder_lr]
    train(run, "autoencoder", {"model": model}, {}, steps, peaks, loss_of, draw_grid)

    if run.grow_from:  # the UNet knows the latents in that scale
        scaling = json.loads((run.grow_from / "vae" / "config.json").read_text())["scaling_factor"]
    else:
        scaling = 1 / encode_all(model, pixels).std().item()
    error = sum(
        (reconstruct(model, as_floats(batch)) - as_floats(batch)).square().sum().item() for batch in pixels.split(8)
    )
    psnr = 10 * math.log10(4 / (error / pixels.numel()))
    # One entry: safetensors writes several in random order, and later stages know this file by its digest.
    finish(folder, model.state_dict(), {"scaling_factor": repr(scaling)})
    announce("autoencoder", f"reconstructs the pictures with {psnr:.1f} dB PSNR")


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
def encode_all(model: nn.Module, pixels: Tensor) -> Tensor:
    """The unscaled latents of uint8 pictures [P, 3, H, W], in float32."""
    return torch.cat([model.encode(as_floats(batch)).latents for batch in pixels.split(8)])


@torch.no_grad()
def reconstruct(model: nn.Module, images: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in -1 … 1 through the autoencoder and back."""
    return model.decode(model.encode(images).latents).sample.clamp(-1, 1)


def load_autoencoder(run: Run):
    """The finished autoencoder, in float32 on the CPU, with the scaling factor that gives its latents deviation 1."""
    path = require(run, run.out / "autoencoder" / "weights.safetensors", "autoencoder")
    model = build_autoencoder(run.preset, scaling_factor=float(read_metadata(path)["scaling_factor"]))
    model.load_state_dict(load_file(path))
    return model.requires_grad_(False).eval()


def encode_pool(run: Run, vae: nn.Module, pictures: Sequence[Picture], origin: dict) -> Tensor:
    """The scaled latents of the preset's canvases, float16 [pool, 4, h, w], from pool/ where they are there already.

    Args:
        origin: digests of data and autoencoder, which pool/ is bound to.
    """
    preset, folder = run.preset, run.out / "pool"
    claim_folder(
        folder,
        {"seed": run.seed, "image_size": preset.image_size, "pool": preset.pool, "canvases": asdict(preset.canvases)}
        | origin,
    )
    canvases, shards = CanvasSet(run, pictures, "pool"), []
    for start in tqdm(range(0, preset.pool, SHARD), desc="pool", unit="shard"):
        path = folder / f"{start:06d}.safetensors"
        if not path.exists():
            pixels = canvases.pixels(range(start, min(start + SHARD, preset.pool)))
            with run.autocast():  # half the time; the error is a hundredth of the latents' deviation
                latents = encode_all(vae, pixels.to(run.device)).float() * vae.config.scaling_factor
            with replacing(path) as part:
                save_file({"latents": latents.half().cpu().contiguous()}, part)
        shards.append(load_file(path)["latents"])
    return torch.cat(shards)
