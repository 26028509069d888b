"""PNG files that carry their settings: save_image, read_settings, check_output."""

from __future__ import annotations

import itertools
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..files import write_atomically

METADATA_KEY = "agentsd"
"""Text chunk of a saved PNG that holds its settings, as JSON."""


def save_image(image: Image.Image, path: str | Path, settings: dict[str, Any] | None = None) -> None:
    """Write a PNG atomically, with its settings inside (`read_settings` gets them back).

    Raises:
        ValueError, OSError: as check_output.
    """
    path = check_output(path)
    info = PngInfo()
    if settings is not None:
        info.add_itxt(METADATA_KEY, json.dumps(settings, ensure_ascii=False))
    write_atomically(path, lambda file: image.save(file, format="PNG", pnginfo=info))


def read_settings(path: str | Path) -> dict[str, Any] | None:
    """The settings that `save_image` put into a PNG, or None where there are none.

    Raises:
        OSError: the file is not an image, or is damaged.
        ValueError: the text in their place is not what `save_image` writes.
    """
    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(METADATA_KEY)
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise OSError(f"{Path(path).name}: is no picture that can be read, or a damaged one ({error})") from error
    if not text:
        return None
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{Path(path).name}: its {METADATA_KEY} text is not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{Path(path).name}: its {METADATA_KEY} text is not a set of settings")
    return settings


def check_output(path: str | Path) -> Path:
    """Make sure, before time is spent, that a PNG can be written to a path.

    Raises:
        ValueError: the name does not end in .png.
        OSError: its folder does not exist or cannot be written to, or the path is a folder.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"output={str(path)!r}: must end in .png, the format that carries the settings")
    if path.is_dir():
        raise IsADirectoryError(f"output={str(path)!r}: is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output={str(path)!r}: the folder {str(path.parent)!r} does not exist; make it first")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise PermissionError(
            f"output={str(path)!r}: the folder {str(path.parent)!r} cannot be written to ({error.strerror})"
        ) from error
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"output={str(path)!r}: the file exists and is write-protected")
    return path


def free_path(path: str | Path, taken: Callable[[Path], bool] = Path.exists) -> Path:
    """A path that nothing is lost by writing to: itself, or `name-2`, `name-3`, … where it is taken.

    Args:
        path: of a file or a folder.
        taken: whether something is there that must stay.

    Example:
        >>> free_path("frog.png")  # with frog.png and frog-2.png in the folder
        PosixPath('frog-3.png')
    """
    path = Path(path)
    if path.name in ("", ".."):  # the working folder, or one above it
        path = path.resolve()
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], numbered) if not taken(candidate))
