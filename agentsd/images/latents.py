"""scale_latents, unscale_latents: between an autoencoder's latents and those that the UNet sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scale_latents(vae: Any, latents: Tensor) -> Tensor:
    """What an autoencoder has encoded, as the UNet sees it, [B, C, H, W]; the inverse is `unscale_latents`.

    (z − mean) · scaling_factor / std, with the mean and the standard deviation of each channel where the autoencoder's
    configuration has them (latents_mean, latents_std), else z · scaling_factor: as diffusers' SDXL pipelines.
    """
    mean, std = _statistics(vae, latents)
    if mean is None or std is None:
        return latents * vae.config.scaling_factor
    return (latents - mean) * vae.config.scaling_factor / std


def unscale_latents(vae: Any, latents: Tensor) -> Tensor:
    """The UNet's latents [B, C, H, W] as the autoencoder decodes them; the inverse is `scale_latents`."""
    mean, std = _statistics(vae, latents)
    if mean is None or std is None:
        return latents / vae.config.scaling_factor
    return latents * std / vae.config.scaling_factor + mean


def has_statistics(vae: Any) -> bool:
    """Whether an autoencoder's configuration has the mean and the standard deviation of its latents."""
    return all(getattr(vae.config, name, None) is not None for name in ("latents_mean", "latents_std"))


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Mean and standard deviation of each channel, [1, C, 1, 1]; None where there are none."""
    if not has_statistics(vae):
        return None, None
    found = [torch.tensor(values).view(1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)]
    return found[0].to(latents), found[1].to(latents)
