"""progress: how far a stage is, as a bar on a terminal and as a line a minute on a pipe or in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

_LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} so far, about {remaining} left{postfix}"
_EVERY = 60.0  # seconds


def progress(steps: Iterable | None = None, **options: Any) -> tqdm:
    """tqdm, with its options. Where stderr is no terminal frames would fill a log: a short stage says nothing there."""
    if not sys.stderr.isatty():
        options = {**options, "bar_format": _LINE, "mininterval": _EVERY, "delay": _EVERY, "file": _Lines(sys.stderr)}
    return tqdm(steps, **options)


class _Lines:
    """A stream on which each frame is a line of its own."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        """Write a frame without what moves the cursor."""
        if text.strip():
            self.stream.write(text.strip() + "\n")

    def flush(self) -> None:
        """Flush the stream."""
        self.stream.flush()
