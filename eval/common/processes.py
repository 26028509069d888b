"""Processes of a benchmark: a folder that one run may use, what was asked for in it, children, and who shares work."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from agentsd.files import write_atomically
from eval.launch import PLACES, REPOSITORY

from .files import read_json
from .protocol import BenchError

_LONGEST_WAIT = timedelta(days=7)  # for the slowest process's share, or for the first one's scores


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep a second run out of the folder; the lock of a killed process is released by the system.

    Raises BenchError where another run is using it, or it cannot be written to.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise BenchError(f"{folder} cannot be written to ({error.strerror or error}): give another --out") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BenchError(
                f"{folder}: another run is using this folder; wait for it, or give another --out"
            ) from None
        yield


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Note what a folder's losses depend on. Raises BenchError where it has losses that depend on something else."""
    path = out / "settings.json"
    found = read_json(path)
    if found is not None:
        for key, value in settings.items():
            if found.get(key) != value:
                raise BenchError(
                    f"{out} was made with {key} {found.get(key)}, not {value}: give the same settings or another --out"
                )
    else:
        write_atomically(path, json.dumps(settings, indent=1) + "\n")


def run_python(arguments: Sequence[str], what: str) -> None:
    """Run Python on a script or module of this repository; its output appears on this terminal.

    Ctrl+C reaches the child too, which may have something to save: it is waited for.

    Raises:
        BenchError: it failed; the message names `what`.
        KeyboardInterrupt: it was stopped.
    """
    path = os.pathsep.join([*PLACES, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen([sys.executable, *arguments], env=environment, cwd=REPOSITORY) as child:
        stopped = False
        while True:
            try:
                code = child.wait()
                break
            except KeyboardInterrupt:
                stopped = True
            except SystemExit:  # SIGTERM, where the caller's handler raises it
                child.send_signal(signal.SIGTERM)
                raise
    if stopped or code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code != 0:
        raise BenchError(f"{what} failed (exit code {code}); its message is above. Give the same command to try again")


class Processes:
    """The processes that accelerate launch started, or this one alone.

    Attributes:
        rank, count: of this process, and of them.
        device: of this one; None where it is the only one and may choose.
    """

    def __init__(self, device: str | None):
        self.rank, self.count = 0, int(os.environ.get("WORLD_SIZE", "1"))
        self.device: str | None = None
        self._state: Any = None
        if self.count > 1:
            import torch
            from accelerate import PartialState

            on_cpu = device == "cpu" or not torch.cuda.is_available()
            state = self._state = PartialState(cpu=on_cpu, timeout=_LONGEST_WAIT)
            self.rank, self.count = state.process_index, state.num_processes
            self.device = str(state.device)

    def wait(self) -> None:
        """Wait until all processes get here."""
        if self._state is not None:
            self._state.wait_for_everyone()
