"""encode_files: latents of the training images, encoded once per run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from agentsd.images.latents import scale_latents

from .data import TrainingImage, read_image
from .draws import generator

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny


@dataclass(frozen=True)
class Encoded:
    """What is kept of a folder of images.

    Attributes:
        latents: [N, C, h, w] float32 on the autoencoder's device.
        sizes: [N, 6] SDXL's time ids: height and width of the original, top and left of the crop, height and width.
        digest: SHA-256 of all that was read, in hexadecimal.
    """

    latents: Tensor
    sizes: Tensor
    digest: str


def encode_image(vae: AutoencoderKL | AutoencoderTiny, pixels: Tensor, noise: torch.Generator) -> Tensor:
    """Encode one image as the UNet sees it.

    An AutoencoderKL gives a normal distribution. It is sampled here, once for all steps: its standard deviation is
    small beside the differences between images, so that new samples in each step would change next to nothing.

    Args:
        pixels: [3, H, W] in -1 … 1.
        noise: of that sample.

    Returns:
        [C, h, w] float32, scaled as the autoencoder's configuration says.
    """
    parameter = next(vae.parameters())
    with torch.no_grad():
        encoded = vae.encode(pixels[None].to(parameter))
    if hasattr(encoded, "latent_dist"):
        posterior = encoded.latent_dist
        drawn = torch.randn(posterior.mean.shape, generator=noise).to(posterior.mean)
        latents = posterior.mean + posterior.std * drawn
    else:
        latents = encoded.latents  # AutoencoderTiny has no distribution
    return scale_latents(vae, latents)[0].float()


def encode_files(
    vae: AutoencoderKL | AutoencoderTiny,
    paths: Sequence[Path],
    resolution: int,
    seed: int,
    name: str,
    quiet: bool = True,
) -> Encoded:
    """Read and encode images one at a time, so that none depends on its companions and few are in memory.

    Args:
        name: "instance" or "class": the option that an error names, and part of the key of the random numbers.
        quiet: no progress bar.

    Raises:
        UsageError: a file cannot be read.
    """
    latents, sizes, digest = [], [], hashlib.sha256()
    for i, path in enumerate(tqdm(paths, desc=f"{name} latents", unit="image", disable=quiet)):
        image = read_image(path, resolution, f"{name}_data_dir")
        latents.append(encode_image(vae, image.pixels, generator(seed, "posterior", name, i)))
        sizes.append(_time_ids(image))
        digest.update(repr(sizes[-1]).encode())
        digest.update(image.pixels.numpy().tobytes())
    device = latents[0].device
    return Encoded(torch.stack(latents), torch.tensor(sizes, dtype=torch.float32, device=device), digest.hexdigest())


def _time_ids(image: TrainingImage) -> list[int]:
    return [*image.size, *image.corner, *image.pixels.shape[1:]]
