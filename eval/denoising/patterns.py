"""pattern_images: smooth random patterns that repeat within an image, for a network that needs its self-attention."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

SIDE, CHANNELS = 24, 3
KINDS = ("period", "period", "period", "mirrored", "rotated", "scattered")
"""Kinds of repetition, each image takes one of them at random; half of the images repeat with a plain period."""

SMOOTHING = 1.1  # standard deviation in pixels of the Gaussian that smooths white noise, at scale 1
_SCATTERED, _SCATTERED_SIDE = 7, 8  # copies of a tile, at least, and its side at scale 1


def pattern_images(seed: int, numbers: Iterable[int], side: int = SIDE, scale: float = 1.0) -> Tensor:
    """Images by their numbers: [len(numbers), 3, side, side], float32, mean 0 and about unit variance.

    A smooth random tile repeats with a period that is random and unknown; as kaleidoscope of mirrored copies; of copies
    turned by quarters; or lies at random places on another smooth pattern. The tile is new in each image, so that
    nothing can be known by heart: the best denoiser averages over the other copies.

    Args:
        seed: another one gives other images throughout.
        numbers: an image depends on the seed and its own number alone.
        side: height and width.
        scale: size of tiles and of their details; at 1, tiles have sides of 5 to 12 pixels.
    """
    return torch.stack([_image(seed, number, side, scale) for number in numbers])


def _image(seed: int, number: int, side: int, scale: float) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    random = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    def length(low: int, high: int) -> int:
        return integer(round(low * scale), round(high * scale))

    kind = KINDS[integer(0, len(KINDS) - 1)]
    if kind == "scattered":
        image = _smooth(side, side, scale, random)
        size = min(side, round(_SCATTERED_SIDE * scale))
        tile = _smooth(size, size, scale, random)
        for _ in range(max(_SCATTERED, round(_SCATTERED * (side / (SIDE * scale)) ** 2))):
            top, left = (integer(0, side - size) for _ in range(2))
            image[:, top : top + size, left : left + size] = tile
        return image
    if kind == "period":
        tile = _smooth(length(5, 11), length(5, 11), scale, random)
    elif kind == "mirrored":
        half = _smooth(length(4, 6), length(4, 6), scale, random)
        tile = torch.cat([half, half.flip(2)], 2)
        tile = torch.cat([tile, tile.flip(1)], 1)
    else:
        size = length(4, 6)
        quarter = _smooth(size, size, scale, random)
        turned = [quarter.rot90(times, (1, 2)) for times in range(4)]
        tile = torch.cat([torch.cat(turned[:2], 2), torch.cat([turned[3], turned[2]], 2)], 1)
    rows = (torch.arange(side) + integer(0, 99)) % tile.shape[1]
    columns = (torch.arange(side) + integer(0, 99)) % tile.shape[2]
    return tile[:, rows][:, :, columns]


def _smooth(height: int, width: int, scale: float, random: torch.Generator) -> Tensor:
    """[3, height, width]: white noise smoothed on a torus, with mean 0 and unit variance."""
    noise = torch.randn(CHANNELS, height, width, generator=random)
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    transfer = torch.exp(-2 * (torch.pi * SMOOTHING * scale) ** 2 * (rows**2 + columns**2))
    tile = torch.fft.irfft2(torch.fft.rfft2(noise) * transfer, s=(height, width))
    tile = tile - tile.mean()
    return tile / tile.std()
