"""Training images: each icon alone and centred, on white or on light grounds of one colour."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .icons import Icon
from .run import Run

WHITE = (255, 255, 255)


def open_icon(path: Path) -> Image.Image:
    """A rasterised icon, RGBA."""
    with Image.open(path) as icon:
        return icon.convert("RGBA")


def compose_image(icon: Image.Image, size: int, margin: float, ground: tuple[int, int, int] = WHITE) -> Image.Image:
    """The training image of an icon: RGB, size × size pixels, the icon centred.

    Args:
        margin: on each side, as a fraction of the image's side.
        ground: RGB colour of the background, 0 … 255.
    """
    border = round(size * margin)
    image = Image.new("RGBA", (size, size), (*ground, 255))
    image.alpha_composite(icon.resize((size - 2 * border,) * 2, Image.Resampling.LANCZOS), (border, border))
    return image.convert("RGB")


def ground_colour(seed: int) -> tuple[int, int, int]:
    """A random light colour, RGB in 219 … 255, white one time in five; a function of the seed alone."""
    draw = np.random.default_rng(seed)
    # The first two draws belonged to kinds of images that are gone: without them the built-in model's grounds differ.
    *_, white = draw.random(3)
    light = np.ones(3) if white < 0.2 else (1 - 0.14 * draw.random(3)).round(4)
    red, green, blue = (int(level) for level in (255 * light.astype(np.float32)).round())
    return red, green, blue


def training_images(run: Run, icons: Sequence[Icon]) -> Tensor:
    """All training images as uint8 [P, 3, H, W]; image number i shows icon number i modulo their count.

    With `grounds` in the preset there are so many of each icon, on random light grounds, otherwise one on white.
    """
    preset = run.preset
    numbers = range(len(icons) * (preset.grounds or 1))

    def compose(number: int) -> Image.Image:
        icon = open_icon(run.out / "data" / icons[number % len(icons)].file)
        # Keys as they have always been, so that the built-in model's images can be made again.
        ground = ground_colour(run.generator("canvas", "pool", number).initial_seed()) if preset.grounds else WHITE
        return compose_image(icon, preset.image_size, preset.margin, ground)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return as_pixels(threads.map(compose, numbers))


def as_pixels(images: Iterable[Image.Image]) -> Tensor:
    """RGB images of one size as uint8 [P, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def as_floats(pixels: Tensor) -> Tensor:
    """uint8 RGB to float32 in -1 … 1."""
    return pixels.float() / 127.5 - 1
