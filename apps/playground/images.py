"""Compare two images: their distance, PSNR, and a map of where they differ."""

from __future__ import annotations

import numpy as np
from PIL import Image

from agentsd.images.image_distance import distance, levels, psnr

__all__ = ["difference_map", "distance", "psnr"]


def difference_map(first: Image.Image, second: Image.Image, gain: float = 4.0) -> Image.Image:
    """Show where two images differ: the largest difference of the three colours times `gain`, white on black.

    Raises:
        ValueError: their sizes differ.
    """
    if first.size != second.size:
        raise ValueError(f"images of {first.size} and {second.size} pixels cannot be compared")
    difference = np.abs(levels(first) - levels(second)).max(axis=-1)
    return Image.fromarray(np.clip(difference * gain, 0, 255).round().astype(np.uint8))
