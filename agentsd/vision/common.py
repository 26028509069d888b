"""What the families share: checks of image sizes and settings, patches of any image, resized position embeddings."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Format, PatchEmbed
from timm.models import register_notrace_function
from torch import Tensor


@torch.fx.wrap
@register_notrace_function  # reason: checks sizes
def checked_image(image: Tensor, img_size: tuple[int, int] | None, least: int) -> Tensor:
    """The image itself, where a model can take one of this size.

    Returning it keeps the check in a traced graph, which drops calls that nobody reads from.

    Args:
        image: [B, C, height, width].
        img_size: the only (height, width) allowed; None for any.
        least: pixels that each side must have.

    Raises:
        ValueError: another size, or a smaller one.
    """
    height, width = image.shape[-2:]
    if img_size is not None and (height != img_size[0] or width != img_size[1]):
        raise ValueError(
            f"image of {height}×{width} pixels: this model was built for {img_size[0]}×{img_size[1]}; resize the "
            "image, or build the model with img_size=(height, width), or with dynamic_img_size=True for any size"
        )
    if height < least or width < least:
        raise ValueError(
            f"image of {height}×{width} pixels: each side must have at least {least}, which make one token of the last "
            "stage; enlarge the image"
        )
    return image


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


@torch.fx.wrap
@register_notrace_function  # reason: compares sizes
def resized_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Position embeddings on another grid, by the authors' interpolation (timm's own has antialiasing).

    Args:
        positions: [1, skipped + h·w, C]; what precedes the grid (a class token) is kept.
        old, new: (height, width) of the grids.

    Returns:
        [1, skipped + new h·w, C].
    """
    if old[0] == new[0] and old[1] == new[1]:
        return positions
    skipped = positions.shape[1] - old[0] * old[1]
    kept, on_grid = positions[:, :skipped], positions[:, skipped:]
    image = on_grid.transpose(1, 2).unflatten(2, (old[0], old[1]))
    image = F.interpolate(image.float(), size=[new[0], new[1]], mode=mode, align_corners=False).to(positions.dtype)
    return torch.cat([kept, image.flatten(2).transpose(1, 2)], dim=1)


@torch.fx.wrap
@register_notrace_function  # reason: sizes decide
def pad_to_multiple(image: Tensor, height: int, width: int) -> Tensor:
    """Pad [B, C, H, W] with zeros at the bottom and the right until height divides H and width divides W."""
    bottom, right = -image.shape[-2] % height, -image.shape[-1] % width
    return F.pad(image, (0, right, 0, bottom)) if bottom > 0 or right > 0 else image


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
        """[B, in_chans, H, W] -> [B, N, C], [B, C, h, w] or [B, h, w, C], as flatten and output_fmt say."""
        x = checked_image(x, self.img_size if self.strict_img_size else None, self.least)
        if self.dynamic_img_pad:
            x = pad_to_multiple(x, self.patch_size[0], self.patch_size[1])
        x = self.proj(x)
        if self.flatten:
            x = x.flatten(2).transpose(1, 2)
        elif self.output_fmt == Format.NHWC:
            x = x.permute(0, 2, 3, 1)
        return self.norm(x)
