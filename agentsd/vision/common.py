"""What the families share: checks of image sizes and settings, patches of any image, resized position embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor


def check_image_size(image: Tensor, img_size: tuple[int, int] | None, least: int) -> None:
    """Raise ValueError where a model cannot take an image of this size.

    Args:
        image: [B, C, height, width].
        img_size: the only (height, width) allowed; None for any.
        least: pixels that each side must have.
    """
    height, width = image.shape[-2:]
    if img_size is not None and (height, width) != tuple(img_size):
        raise ValueError(
            f"image of {height}×{width} pixels: this model was built for {img_size[0]}×{img_size[1]}; resize the "
            "image, or build the model with img_size=(height, width), or with dynamic_img_size=True for any size"
        )
    if height < least or width < least:
        raise ValueError(
            f"image of {height}×{width} pixels: each side must have at least {least}, which make one token of the last "
            "stage; enlarge the image"
        )


def both_sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size given as one number or as two."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def refuse(settings: dict[str, Any], names: tuple[str, ...], reason: str) -> None:
    """Raise ValueError where one of timm's settings is given that a model with agent attention cannot follow."""
    for name in names:
        if settings.get(name):
            raise ValueError(f"{name}={settings[name]!r}: {reason}; leave it out")


def per_stage(name: str, value: Any, stages: int) -> tuple:
    """One value per stage, given for all stages at once or as a sequence.

    Raises:
        ValueError: the sequence has another length.
    """
    if not isinstance(value, (tuple, list)):
        return (value,) * stages
    if len(value) != stages:
        raise ValueError(f"{name}={value!r}: give one value, or one for each of the {stages} stages")
    return tuple(value)


def resized_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Position embeddings on another grid, by the authors' interpolation (timm's own has antialiasing).

    Args:
        positions: [1, skipped + h·w, C]; what precedes the grid (a class token) is kept.
        old, new: (height, width) of the grids.

    Returns:
        [1, skipped + new h·w, C].
    """
    if tuple(old) == tuple(new):
        return positions
    skipped = positions.shape[1] - old[0] * old[1]
    kept, on_grid = positions[:, :skipped], positions[:, skipped:]
    image = on_grid.transpose(1, 2).unflatten(2, tuple(old))
    image = F.interpolate(image.float(), size=tuple(new), mode=mode, align_corners=False).to(positions.dtype)
    return torch.cat([kept, image.flatten(2).transpose(1, 2)], dim=1)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Pad [B, C, H, W] with zeros at the bottom and the right until the multiple divides both sides."""
    bottom, right = -image.shape[-2] % multiple, -image.shape[-1] % multiple
    return F.pad(image, (0, right, 0, bottom)) if bottom or right else image


class AnySizePatchEmbed(PatchEmbed):
    """timm's patch embedding, with our error for a wrong size; it pads where any size is allowed.

    Args:
        least: pixels that each side of an image must have.
        Others: as in timm.
    """

    def __init__(self, least: int = 1, strict_img_size: bool = True, dynamic_img_pad: bool = False, **settings: Any):
        padded = dynamic_img_pad or not strict_img_size
        super().__init__(strict_img_size=strict_img_size, dynamic_img_pad=padded, **settings)
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        check_image_size(x, self.img_size if self.strict_img_size else None, self.least)
        return super().forward(x)
