"""encode_images: latents of the training images, encoded once per run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .data import TrainingImage
from .draws import generator


def encode_image(vae: nn.Module, pixels: Tensor, noise: torch.Generator) -> Tensor:
    """Encode one image as the UNet sees it.

    An AutoencoderKL gives a normal distribution. It is sampled here, once for all steps: its standard deviation is
    small beside the differences between images, so that new samples in each step would change next to nothing.

    Args:
        pixels: [3, H, W] in -1 … 1.
        noise: of that sample.

    Returns:
        [C, h, w] float32, scaled by the autoencoder's own factor.
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
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    factor = vae.config.scaling_factor
    if mean is not None and std is not None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
        return ((latents - mean) * factor / std)[0].float()
    return (latents * factor)[0].float()


def encode_images(vae: nn.Module, images: Sequence[TrainingImage], seed: int, name: str, quiet: bool) -> Tensor:
    """`encode_image` for each image, one at a time, so that none depends on its companions.

    Args:
        name: "instance" or "class", part of the key of the random numbers.
        quiet: no progress bar.

    Returns:
        [N, C, h, w] float32 on the autoencoder's device.
    """
    bar = tqdm(images, desc=f"{name} latents", unit="image", disable=quiet)
    return torch.stack(
        [encode_image(vae, image.pixels, generator(seed, "posterior", name, i)) for i, image in enumerate(bar)]
    )
