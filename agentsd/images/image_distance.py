"""How far two images are apart: root of the mean squared difference, and PSNR."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image


def distance(first: Image.Image, second: Image.Image) -> float:
    """Root of the mean squared difference over all pixels and colours, in grey levels 0 … 255."""
    return float(np.sqrt(np.mean((levels(first) - levels(second)) ** 2)))


def psnr(rmse: float) -> float:
    """Peak signal-to-noise ratio in dB of two images with that distance; infinite for equal ones."""
    return math.inf if rmse == 0 else 20 * math.log10(255 / rmse)


def levels(image: Image.Image) -> np.ndarray:
    """[height, width, 3] grey levels 0 … 255."""
    return np.asarray(image.convert("RGB"), dtype=np.float64)
