"""Outputs: the files that visitors may download, in a folder of their own."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from agentsd.images.png import save_image

from .browser import is_key

_RUN = "run.json"
_KEEP_SECONDS, _TIDY_EVERY = 24 * 3600.0, 600.0


class Outputs:
    """A folder of files, each in a folder with a name that cannot be guessed; files older than a day are removed.

    Args:
        folder: made if missing.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tidied = time.monotonic()
        self._lock = threading.Lock()

    def image(self, image: Image.Image, name: str, settings: dict[str, Any] | None = None) -> str:
        """Save a PNG with its settings inside; returns its path."""
        path = self._new(name + ".png")
        save_image(image, path, settings)
        return str(path)

    def text(self, content: str, name: str) -> str:
        """Save a text file; returns its path."""
        path = self._new(name)
        path.write_text(content, encoding="utf-8")
        return str(path)

    def keep(self, run: Mapping[str, Any]) -> str:
        """Keep what shows a run again, with its images' paths in "image" and "shown"; returns its key."""
        path = self._new(_RUN)
        path.write_text(json.dumps(run, ensure_ascii=False), encoding="utf-8")
        return path.parent.name

    def recall(self, key: Any) -> dict[str, Any] | None:
        """What was kept under a key; None where it, or one of its images, is no longer there."""
        if not is_key(key):
            return None
        try:
            run = json.loads((self.folder / key / _RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return run if all(map(os.path.isfile, [run["image"], *run["shown"].values()])) else None

    def _new(self, name: str) -> Path:
        self._tidy()
        folder = self.folder / secrets.token_hex(16)
        folder.mkdir()
        return folder / name

    def _tidy(self) -> None:
        with self._lock:
            if time.monotonic() - self._tidied < _TIDY_EVERY:
                return
            self._tidied = time.monotonic()
        limit = time.time() - _KEEP_SECONDS
        for folder in self.folder.iterdir():
            if folder.stat().st_mtime < limit:
                shutil.rmtree(folder, ignore_errors=True)


def file_name(prompt: str, *parts: object) -> str:
    """A short name for an image, from its prompt: letters, digits and hyphens only."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return "-".join(str(part) for part in (words or "image", *parts))
