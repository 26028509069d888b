"""Training pictures as pixels: rasterised icons alone on white, or composed on numbered canvases."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .canvases import Canvas, draw_canvas, plan_canvas
from .icons import Picture
from .run import Run


def open_icon(path: Path) -> Image.Image:
    """A rasterised icon, RGBA."""
    with Image.open(path) as icon:
        return icon.convert("RGBA")


def compose_picture(icon: Image.Image, size: int) -> Image.Image:
    """The training picture of an icon: RGB, size × size pixels.

    The one place that decides where an icon stands and on what: centred, on white, with a margin of 4 %.
    """
    margin = round(size * 0.04)
    picture = Image.new("RGBA", (size, size), "white")
    picture.alpha_composite(icon.resize((size - 2 * margin,) * 2, Image.Resampling.LANCZOS), (margin, margin))
    return picture.convert("RGB")


def load_pictures(run: Run, pictures: Sequence[Picture]) -> Tensor:
    """Each icon alone, centred on white: [P, 3, image_size, image_size], uint8 RGB."""
    size = run.preset.image_size
    return as_pixels(compose_picture(open_icon(run.out / "data" / picture.file), size) for picture in pictures)


@dataclass(frozen=True)
class CanvasSet:
    """Numbered canvases, each planned and drawn when asked for; `purpose` keeps two sets of one seed apart."""

    run: Run
    pictures: Sequence[Picture]
    purpose: str

    @functools.cached_property
    def files(self) -> dict[tuple[str, str], Path]:
        """(name, style) to file."""
        return {(picture.name, picture.style): self.run.out / "data" / picture.file for picture in self.pictures}

    def plan(self, number: int) -> Canvas:
        """Canvas `number`; the icons take turns as its subject."""
        seed = self.run.generator("canvas", self.purpose, number).initial_seed()
        main, size = number % len(self.pictures), self.run.preset.image_size
        return plan_canvas(self.run.preset.canvases, list(self.files), main, size, seed)

    def pixels(self, numbers: Iterable[int]) -> Tensor:
        """The canvases as uint8 [P, 3, H, W], drawn on all cores."""

        def draw(number: int) -> Image.Image:
            return draw_canvas(self.plan(number), lambda *icon: open_icon(self.files[icon]), self.run.preset.image_size)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return as_pixels(threads.map(draw, numbers))


def as_pixels(pictures: Iterable[Image.Image]) -> Tensor:
    """RGB pictures of one size as uint8 [P, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).contiguous()


def as_floats(pixels: Tensor) -> Tensor:
    """uint8 RGB to float32 in -1 … 1."""
    return pixels.float() / 127.5 - 1
