"""ComfyUI in an environment of its own: the tests talk to a worker process in it.

`.ci/comfyui FOLDER` prepares that environment; AGENTSD_COMFYUI names the folder. Without it the tests are skipped,
unless AGENTSD_REQUIRE_COMFYUI says that it must be there.
"""

from __future__ import annotations

import atexit
import functools
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


def comfyui_folder() -> Path:
    """The folder that `.ci/comfyui` prepared; skips the test where there is none."""
    named = os.environ.get("AGENTSD_COMFYUI", "")
    folder = Path(named)
    if named and (folder / "ComfyUI" / "main.py").is_file():
        return folder.resolve()
    message = f"AGENTSD_COMFYUI={named!r} is no folder with ComfyUI; `.ci/comfyui FOLDER` prepares one"
    if os.environ.get("AGENTSD_REQUIRE_COMFYUI"):
        pytest.fail(message)
    pytest.skip(message)


def environment() -> dict[str, str]:
    """Variables for processes in ComfyUI's environment: this tree's agentsd, one thread."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


class Worker:
    """comfyui_worker.py in a process: `worker("function", argument=…)` calls a function there."""

    def __init__(self, folder: Path):
        places = [str(folder / "ComfyUI"), str(REPOSITORY)]
        self.process = subprocess.Popen(
            [folder / "venv" / "bin" / "python", Path(__file__).with_name("comfyui_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment(), "PYTHONPATH": os.pathsep.join(places)},
        )

    def __call__(self, function: str, **arguments: Any) -> Any:
        """Call a function of the worker. Raises RuntimeError with its traceback where it raised."""
        try:
            pickle.dump((function, arguments), self.process.stdin)
            self.process.stdin.flush()
            failure, result = pickle.load(self.process.stdout)
        except (BrokenPipeError, EOFError) as error:
            raise RuntimeError("ComfyUI's process ended; what it printed is in the captured stderr") from error
        if failure:
            raise RuntimeError(failure)
        return result

    def close(self) -> None:
        self.process.kill()  # ComfyUI's own way to the exit takes seconds
        self.process.wait()


@functools.lru_cache
def _worker() -> Worker:
    worker = Worker(comfyui_folder())
    atexit.register(worker.close)
    return worker


@pytest.fixture(scope="session")
def comfyui():
    """A worker in ComfyUI's environment, the same one for all files: it takes ten seconds to start."""
    return _worker()
