"""write_atomically: a file is written completely or not at all; standard library only."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | Path, data: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Write a file so that readers see either what was there before or all of the new content.

    The content goes to a temporary file `.agentsd-….tmp` in the same folder, which then replaces the target. An
    exception or Ctrl+C removes it; a killed process can leave it behind. It is not synchronised to the disk, so the
    guarantee does not cover a power failure.

    Args:
        path: the file, in a folder that exists. Its permissions become those of any new file.
        data: the content: bytes, a text (written as UTF-8, line ends unchanged), or a function that writes to the
            binary file that it is given.

    Raises:
        OSError: the folder is missing or cannot be written to, or the disk is full. What `data` raises passes through.
    """
    path = Path(path)
    if isinstance(data, str):
        data = data.encode("utf-8")
    temporary = path.parent / f".agentsd-{secrets.token_hex(8)}.tmp"  # path's own name may be as long as allowed
    # Not tempfile.mkstemp: its files are private, and reading the umask to widen them is not safe among threads.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
