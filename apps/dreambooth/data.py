"""Training images from a folder: found, checked, turned upright, put on white, and cropped to a square."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .settings import UsageError, option

_LEAST = 8
"""An image must have at least 1/8 of the resolution: enlarged further, it shows nothing but blur."""

_SHOWN = 5
_SUB_FOLDERS = "sub-folders, whose images are not used"

_SIXTEEN_BITS = ("PNG", "PPM")
"""Formats that Pillow opens in its 32-bit mode for the sake of 16 bits, and scales to those."""


_DARKEST = 4096
"""Cameras and microscopes write 10 or 12 bits into 16: with fewer than so many levels an image is meant otherwise."""


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


@dataclass(frozen=True)
class Found:
    """What lies in a folder of images.

    Attributes:
        images: the image files, sorted by name.
        left_out: what else there is, by why it is not used; files that are hidden and no images are in neither.
    """

    images: list[Path]
    left_out: dict[str, list[str]]

    def sentences(self) -> list[str]:
        """One for each reason, with the first few names."""
        return [
            f"{why}: {', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}"
            for why, names in self.left_out.items()
        ]


def find_images(folder: Path, field: str, apart: Sequence[str | Path | None] = ()) -> Found:
    """The images in a folder, and all else that is there.

    Args:
        apart: folders with a meaning of their own, which may lie in this one.

    Raises:
        UsageError: the folder is missing or cannot be listed, or an image is a link to nothing.
    """
    name = f"{option(field)} {folder}"
    if not folder.exists():
        raise UsageError(f"{name}: there is no such folder; give the folder that has the images")
    if not folder.is_dir():
        raise UsageError(f"{name}: is a file; give the folder that has the images")
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UsageError(f"{name}: cannot be listed ({error.strerror}); give a folder that you may read") from None
    others = {Path(path).resolve() for path in apart if path is not None}
    found = Found([], {})
    for path in entries:
        if path.is_dir():
            count = 0 if path.resolve() in others else _count_images(path)
            if count:
                found.left_out.setdefault(_SUB_FOLDERS, []).append(f"{path.name} ({count} images)")
            elif path.resolve() not in others and not path.name.startswith("."):
                found.left_out.setdefault("sub-folders without images", []).append(path.name)
        elif not _named_as_image(path):
            if not path.name.startswith("."):
                found.left_out.setdefault("no images that Pillow reads", []).append(path.name)
        elif path.name.startswith("."):
            found.left_out.setdefault("hidden", []).append(path.name)
        elif path.is_symlink() and not path.exists():
            raise UsageError(
                f"{option(field)}: {path} is a link to {os.readlink(path)}, which is not there; mend it or take it out"
            )
        elif path.is_file():
            found.images.append(path)
        else:
            found.left_out.setdefault("no ordinary files", []).append(path.name)
    return found


def find_instance_images(folder: Path, apart: Sequence[str | Path | None] = ()) -> Found:
    """`find_images` of --instance-data-dir, which must have one at least. Raises UsageError."""
    found = find_images(folder, "instance_data_dir", apart)
    if not found.images:
        files = sum(len(names) for why, names in found.left_out.items() if "sub-folders" not in why)
        besides = f" among its {files} files" if files else ""
        why = f" (left out, as they are {'; '.join(found.sentences())})" if found.left_out else ""
        raise UsageError(
            f"--instance-data-dir {folder}: has no image{besides}{why}; put three or more images of the subject there "
            "(PNG, JPEG, WebP …)"
        )
    return found


def _named_as_image(path: Path) -> bool:
    """Whether the name ends as that of a format that Pillow reads; some it only writes, as PDF."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    return kind in Image.OPEN


def _count_images(folder: Path) -> int:
    """How many files in a folder and all folders below it have the name of an image."""
    return sum(_named_as_image(path) and path.is_file() for path in folder.rglob("*"))


def read_image(path: Path, resolution: int, field: str) -> TrainingImage:
    """Read an image: upright by its EXIF orientation, on white where transparent, scaled and cropped at the centre.

    Raises:
        UsageError: it cannot be read, is too small, or has floats or 32-bit integers for pixels, of unknown range.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as file:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            check_range(file)
            image = on_white(ImageOps.exif_transpose(file))
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


def check_range(image: Image.Image) -> None:
    """Raise ValueError where nothing says which value is white: Pillow's conversions would make most of it black."""
    if image.mode == "F" or (image.mode == "I" and image.format not in _SIXTEEN_BITS):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its pixels are {kind} of unknown range: save it with 8 bits")


def on_white(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, laid on white. Raises ValueError for fewer than 12 bits in the low end of 16."""
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion cuts values above 255 off
        values, clear = np.asarray(image).clip(0, 65535), image.info.get("transparency")
        if values.max() < _DARKEST:
            raise ValueError(
                f"its 16-bit pixels reach {values.max()} of 65535, so that it is black: scale it or save it with 8 bits"
            )
        image = Image.fromarray((values / 257).round().astype(np.uint8))
        if isinstance(clear, int):  # the one grey value that a PNG declares transparent
            image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _brief(error: BaseException) -> str:
    text = str(getattr(error, "strerror", None) or error).splitlines()
    return text[0].replace(os.sep, "/")[:100].rstrip(".") if text else type(error).__name__
