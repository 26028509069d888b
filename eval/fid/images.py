"""Read image files: which files of a folder are images, and their pixels as 8-bit RGB on white."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dreambooth.data import check_range, on_white
from PIL import Image, ImageOps

from agentsd.files import write_atomically
from eval.common.protocol import BenchError

FEWEST_IMAGES = 10
"""A Fréchet distance of fewer images says nothing; a reference folder with fewer is taken for a mistake."""

_SUFFIXES = frozenset(
    ".apng .avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .qoi .tga .tif .tiff"
    " .webp".split()
)


def read_image(path: Path) -> Image.Image:
    """An image file as DreamBooth reads it too: 8-bit RGB, rotated as its EXIF data says, on white where transparent.

    Nobody sees what lies under transparent pixels, and it may be anything; Pillow's own conversion would show it.
    Grey of 16 bits is scaled to 8, where that conversion would clip it to white. Of an animation it is the first frame.

    Raises:
        BenchError: the file is no readable image, or nothing says which value is white: its pixels are floats or 32-bit
            integers, or 12 bits and fewer in 16.
    """
    try:
        with Image.open(path) as file:
            check_range(file)
            return on_white(ImageOps.exif_transpose(file))
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise BenchError(f"{path} cannot be read as an image ({first_line(error)}): repair or remove it") from error


def save_grid(image: Image.Image, path: Path) -> None:
    """Write an image that is shown on a page, as WebP: a tenth of a PNG's size, with no difference that one sees."""
    write_atomically(path, lambda file: image.save(file, format="WEBP", quality=88, method=6))


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


def said_of_transparent(files: Sequence[Path]) -> str:
    """What is done with the images that have an alpha channel or transparent colours; "" where none has."""
    count = 0
    for path in files:
        with Image.open(path) as image:
            count += image.has_transparency_data
    return f"{count} of {len(files)} images have transparency and are laid on white" if count else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and path.is_file()


def _why_unreadable(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            check_range(image)
            if image.mode.startswith("I"):
                on_white(image)  # its greatest value counts, so all of it is decoded
            else:
                image.verify()
    except Exception as error:
        return first_line(error)
    return None
