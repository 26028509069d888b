"""Read image files: which files of a folder are images, and their pixels as 8-bit RGB."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from eval.common.protocol import BenchError

FEWEST_IMAGES = 10
"""A Fréchet distance of fewer images says nothing; a reference folder with fewer is taken for a mistake."""

_SUFFIXES = frozenset(
    ".apng .avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .qoi .tga .tif .tiff"
    " .webp".split()
)


def read_image(path: Path) -> Image.Image:
    """An image file as 8-bit RGB, rotated as its EXIF data says; of an animation the first frame.

    16-bit grey is scaled to 8 bits: Pillow's own conversion would clip it to white.

    Raises:
        BenchError: the file is no readable image, or its pixels are floats or 32-bit integers of unknown range.
    """
    try:
        with Image.open(path) as file:
            _check_mode(file)
            image: Image.Image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):
                values = np.asarray(image, dtype=np.float64)
                image = Image.fromarray(np.round(values / 257).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise BenchError(f"{path} cannot be read as an image ({first_line(error)}): repair or remove it") from error


def save_grid(image: Image.Image, path: Path) -> None:
    """Write an image that is shown on a page, as WebP: a tenth of a PNG's size, with no difference that one sees."""
    image.save(path, format="WEBP", quality=88, method=6)


def reference_files(folder: Path, per_class: int | None = None) -> list[Path]:
    """The images of a reference folder, after checking that each can be read.

    Args:
        folder: images, or one folder of images per class (ImageNet's validation set as torchvision expects it).
        per_class: the first so many of each class, by name; None for all.

    Raises:
        BenchError: too few, unreadable, or not laid out as one of the two.
    """
    if not folder.is_dir():
        raise BenchError(f"reference {folder}: there is no such folder, and it is no .npz file")
    flat = sorted(path for path in folder.iterdir() if _is_image(path))
    classes = {sub: sorted(filter(_is_image, sub.rglob("*"))) for sub in sorted(folder.iterdir()) if sub.is_dir()}
    if flat and any(classes.values()):
        sub = next(sub for sub, files in classes.items() if files)
        raise BenchError(
            f"reference {folder}: has images both in itself ({flat[0].name} …) and in folders ({sub.name} …): put all "
            "into one folder, or all into one folder per class"
        )
    if flat and per_class is not None:
        raise BenchError(
            f"reference {folder}: is one folder, so the first {per_class} of each class are unknown: put each class "
            "into a folder of its own, or leave --reference-per-class out"
        )
    groups = [flat] if flat else classes.values()
    files = [path for group in groups for path in group[:per_class]]
    if len(files) < FEWEST_IMAGES:
        raise BenchError(
            f"reference {folder}: has {len(files)} images, a Fréchet distance needs at least {FEWEST_IMAGES}, and some "
            "thousands to be worth much"
        )
    with ThreadPoolExecutor(8) as pool:
        for path, error in zip(files, pool.map(_why_unreadable, files)):
            if error:
                raise BenchError(f"reference {path}: cannot be read as an image ({error}): repair or remove it")
    return files


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and path.is_file()


def _check_mode(image: Image.Image) -> None:
    # Pillow before 11.3 opens a 16-bit PNG in the 32-bit mode "I".
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ValueError(f"its pixels are {'floats' if image.mode == 'F' else '32-bit integers'}: save it with 8 bits")


def _why_unreadable(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            _check_mode(image)
            image.verify()
    except Exception as error:
        return first_line(error)
    return None
