"""Compare two images: their distance, PSNR, and a map of where they differ."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image


def distance(first: Image.Image, second: Image.Image) -> float:
    """Root of the mean squared difference over all pixels and colours, in grey levels 0 … 255."""
    return float(np.sqrt(np.mean((_levels(first) - _levels(second)) ** 2)))


def psnr(rmse: float) -> float:
    """Peak signal-to-noise ratio in dB of two images with that distance; infinite for equal ones."""
    return math.inf if rmse == 0 else 20 * math.log10(255 / rmse)


def difference_map(first: Image.Image, second: Image.Image, gain: float = 4.0) -> Image.Image:
    """Show where two images differ: the largest difference of the three colours times `gain`, white on black.

    Raises:
        ValueError: their sizes differ.
    """
    if first.size != second.size:
        raise ValueError(f"images of {first.size} and {second.size} pixels cannot be compared")
    difference = np.abs(_levels(first) - _levels(second)).max(axis=-1)
    return Image.fromarray(np.clip(difference * gain, 0, 255).round().astype(np.uint8))


def _levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float64)
