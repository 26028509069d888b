"""The app as a process of its own: told to end while it generates, it does, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("gradio")
from gradio_client import Client

DEMO = Path(__file__).resolve().parents[1] / "apps" / "demo.py"
HANGS = 60  # seconds; a bound on hanging, far below the time of the runs


@pytest.fixture
def app(tmp_path):
    """(process, address, its log, its folder of temporary files)."""
    log, temporary = tmp_path / "log", tmp_path / "tmp"
    temporary.mkdir()
    environment = {
        **os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(DEMO)],
            env=environment,
            stdout=output,
            stderr=output,
            # A shell that starts the tests in the background has them, and what they start, ignore Ctrl+C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        while not (told := re.search(r"open (http\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield process, told[1], log, temporary
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    "signals",
    # A start costs ten seconds, so Ctrl+C is the first of two signals: its own exit code is 0 or that of the second.
    [(signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM)],
    ids=["SIGTERM", "SIGINT-then-SIGTERM"],
)
def test_it_ends_while_it_generates(app, signals, tmp_path):
    process, address, log, temporary = app
    (private,) = temporary.glob("agentsd-app-*")
    client = Client(address, verbose=False, download_files=str(tmp_path))
    # 2,250 steps at 128 px: far longer than the test waits for the first two.
    arguments = dict(steps=150, rounds=5, width=128, height=128, api_name="/compare")
    jobs = [client.submit("a castle", **arguments) for _ in range(2)]  # one has to wait
    while not any("step 2 of" in output["status"] for job in jobs for output in job.outputs()):
        assert not any(job.done() for job in jobs) and process.poll() is None, log.read_text()
        time.sleep(0.1)
    for sign in signals:
        process.send_signal(sign)
        time.sleep(0.5)
    # A second signal may come when all is tidied up and only the last step is waited for: then it is the end.
    assert process.wait(timeout=HANGS) in ((0,) if len(signals) == 1 else (0, -signal.SIGTERM))
    assert not private.exists() and not list(temporary.glob("agentsd-app-*"))
    assert not any(word in log.read_text() for word in ("KeyboardInterrupt", "Traceback", "CancelledError"))
    with contextlib.suppress(Exception):  # the server that would be told is gone
        for job in jobs:
            job.cancel()
