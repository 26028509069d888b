"""Training images from a folder: found, checked, turned upright, put on white, and cropped to a square."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .settings import UsageError, option

_LEAST = 8
"""An image must have at least 1/8 of the resolution: enlarged further, it shows nothing but blur."""


@dataclass(frozen=True)
class TrainingImage:
    """One image as it is trained on.

    Attributes:
        pixels: [3, resolution, resolution] float32 in -1 … 1.
        size: (height, width) of the upright original, which SDXL is told.
        corner: (top, left) of the crop in the resized original, which SDXL is told.
    """

    pixels: Tensor
    size: tuple[int, int]
    corner: tuple[int, int]


def find_images(folder: Path, field: str) -> tuple[list[Path], list[Path]]:
    """The image files of a folder, sorted by name, and the other files. Hidden files count as neither.

    Raises:
        UsageError: the folder is missing or cannot be listed.
    """
    name = f"{option(field)} {folder}"
    if not folder.exists():
        raise UsageError(f"{name}: there is no such folder; give the folder that has the images")
    if not folder.is_dir():
        raise UsageError(f"{name}: is a file; give the folder that has the images")
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise UsageError(f"{name}: cannot be listed ({error.strerror}); give a folder that you may read") from None
    known = Image.registered_extensions()
    images = [path for path in files if path.suffix.lower() in known]
    return images, [path for path in files if path not in images]


def find_instance_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """`find_images` of --instance-data-dir, which must have one at least. Raises UsageError."""
    images, others = find_images(folder, "instance_data_dir")
    if not images:
        besides = f" among its {len(others)} files" if others else ""
        raise UsageError(
            f"--instance-data-dir {folder}: has no image{besides}; put three or more images of the subject there "
            "(PNG, JPEG, WebP …)"
        )
    return images, others


def read_image(path: Path, resolution: int, field: str) -> TrainingImage:
    """Read an image: upright by its EXIF orientation, on white where transparent, scaled and cropped at the centre.

    Raises:
        UsageError: it cannot be read, or is too small.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as file:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = _on_white(ImageOps.exif_transpose(file))
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise UsageError(
            f"{option(field)}: {path} cannot be read as an image ({_brief(error)}); replace it or take it out"
        ) from None
    width, height = image.size
    least = max(1, resolution // _LEAST)
    if min(width, height) < least:
        raise UsageError(
            f"{option(field)}: {path} has {width} × {height} pixels; at --resolution {resolution} each side must have "
            f"at least {least}: replace it or take it out"
        )
    # As ImageOps.fit does, with a corner in whole pixels.
    scale = resolution / min(width, height)
    size = max(resolution, round(width * scale)), max(resolution, round(height * scale))
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    square = image.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1
    return TrainingImage(pixels.contiguous(), (height, width), (top, left))


def _on_white(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, laid on white."""
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion cuts values above 255 off
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _brief(error: BaseException) -> str:
    text = str(getattr(error, "strerror", None) or error).splitlines()
    return text[0].replace(os.sep, "/")[:100].rstrip(".") if text else type(error).__name__
