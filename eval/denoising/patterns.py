"""pattern_images: smooth random patterns that repeat within an image, for a network that needs its self-attention."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

SIDE, CHANNELS = 24, 3
KINDS = ("period", "period", "period", "mirrored", "rotated", "scattered")
"""Kinds of repetition, each image takes one of them at random; half of the images repeat with a plain period."""

_SMOOTHING = 1.1  # standard deviation in pixels of the Gaussian that smooths white noise
_SCATTERED, _SCATTERED_SIDE = 7, 8


def pattern_images(seed: int, numbers: Iterable[int], side: int = SIDE) -> Tensor:
    """Images by their numbers: [len(numbers), 3, side, side], float32, mean 0 and about unit variance.

    A smooth random tile repeats with a period that is random and unknown; as kaleidoscope of mirrored copies; of copies
    turned by quarters; or lies at random places on another smooth pattern. The tile is new in each image, so that
    nothing can be known by heart: the best denoiser averages over the other copies.

    Args:
        seed: another one gives other images throughout.
        numbers: an image depends on the seed and its own number alone.
        side: height and width.
    """
    return torch.stack([_image(seed, number, side) for number in numbers])


def _image(seed: int, number: int, side: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    random = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    kind = KINDS[integer(0, len(KINDS) - 1)]
    if kind == "scattered":
        image = _smooth(side, side, random)
        tile = _smooth(_SCATTERED_SIDE, _SCATTERED_SIDE, random)
        for _ in range(_SCATTERED):
            top, left = (integer(0, side - _SCATTERED_SIDE) for _ in range(2))
            image[:, top : top + _SCATTERED_SIDE, left : left + _SCATTERED_SIDE] = tile
        return image
    if kind == "period":
        tile = _smooth(integer(5, 11), integer(5, 11), random)
    elif kind == "mirrored":
        half = _smooth(integer(4, 6), integer(4, 6), random)
        tile = torch.cat([half, half.flip(2)], 2)
        tile = torch.cat([tile, tile.flip(1)], 1)
    else:
        size = integer(4, 6)
        quarter = _smooth(size, size, random)
        turned = [quarter.rot90(times, (1, 2)) for times in range(4)]
        tile = torch.cat([torch.cat(turned[:2], 2), torch.cat([turned[3], turned[2]], 2)], 1)
    rows = (torch.arange(side) + integer(0, 99)) % tile.shape[1]
    columns = (torch.arange(side) + integer(0, 99)) % tile.shape[2]
    return tile[:, rows][:, :, columns]


def _smooth(height: int, width: int, random: torch.Generator) -> Tensor:
    """[3, height, width]: white noise smoothed on a torus, with mean 0 and unit variance."""
    noise = torch.randn(CHANNELS, height, width, generator=random)
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    transfer = torch.exp(-2 * (torch.pi * _SMOOTHING) ** 2 * (rows**2 + columns**2))
    tile = torch.fft.irfft2(torch.fft.rfft2(noise) * transfer, s=(height, width))
    tile = tile - tile.mean()
    return tile / tile.std()
