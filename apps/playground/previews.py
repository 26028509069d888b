"""Preview: a small image of what the latents have become so far, at little cost."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

_SIDE = 192  # of the image that the colours are fitted to
_LARGEST = 1.6  # standard deviation; finished latents of every model seen stay below


class Preview:
    """Turns latents into small images by a linear map from latent channels to colours.

    Decoding every step would take as long as the steps do. One latent pixel stands for 8 × 8 pixels, and its channels
    are close to a linear function of their mean colour, for every autoencoder of this kind; the map is fitted by least
    squares to an image of coloured blobs and its latents.

    Args:
        pipe: a Stable Diffusion pipeline, whose autoencoder is asked once.
    """

    def __init__(self, pipe: Any):
        self._weights = _fit(pipe)

    def __call__(self, latents: Tensor) -> Image.Image:
        """[1, channels, h, w] -> an RGB image of w × h pixels."""
        latent = latents[0].detach().float().cpu()
        # The first steps of some schedulers are many times larger than finished latents.
        latent = latent * min(1.0, _LARGEST / max(float(latent.std()), 1e-6))
        colours = latent.flatten(1).T @ self._weights[:-1] + self._weights[-1]
        pixels = (colours.clamp(0, 1) * 255).round().to(torch.uint8).reshape(*latent.shape[1:], 3)
        return Image.fromarray(pixels.numpy())


@torch.no_grad()
def _fit(pipe: Any) -> Tensor:
    """[channels + 1, 3]: weights and, in the last row, the offset."""
    vae = pipe.vae
    dtype = next(vae.parameters()).dtype
    upcast = dtype != torch.float32 and vae.config.get("force_upcast", False)
    if upcast:
        vae.to(torch.float32)  # SDXL's overflows in float16; its pipeline does the same before it decodes
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 7, 7, generator=generator) * 2 - 0.5  # many places fully black, white or saturated
    image = interpolate(coarse, size=(_SIDE, _SIDE), mode="bicubic").clamp(0, 1)
    parameter = next(vae.parameters())
    encoded = vae.encode((image * 2 - 1).to(parameter))
    latent = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    if upcast:
        vae.to(dtype)
    latent = (latent * vae.config.scaling_factor).float().nan_to_num().cpu()
    colours = avg_pool2d(image, _SIDE // latent.shape[-1])[0].flatten(1).T
    channels = latent[0].flatten(1).T
    with_offset = torch.cat([channels, torch.ones(len(channels), 1)], dim=1)
    # Ridge: random weights may give channels that depend on one another.
    gram = with_offset.T @ with_offset + 1e-4 * torch.eye(with_offset.shape[1])
    return torch.linalg.solve(gram, with_offset.T @ colours)
