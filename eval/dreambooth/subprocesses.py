"""run_module: run a part of the benchmark in a process of its own, whose peak memory is then its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.common.protocol import BenchError

ROOT = Path(__file__).parents[2]


def run_python(arguments: Sequence[str], what: str) -> None:
    """Run Python on a script or module of this repository; its output appears on this terminal.

    Ctrl+C reaches the child too, which may have something to save: it is waited for.

    Raises:
        BenchError: it failed; the message names `what`.
        KeyboardInterrupt: it was stopped.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "apps"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen([sys.executable, *arguments], env={**os.environ, "PYTHONPATH": path}, cwd=ROOT) as child:
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
