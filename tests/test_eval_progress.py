"""eval/common/progress.py: a bar on a terminal; on a pipe a line a minute, and no frame of a bar."""

from __future__ import annotations

import io
import sys

import pytest

from eval.common import progress as module
from eval.common.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream, frames", [(Terminal, True), (io.StringIO, False)])
def test_frames_are_for_a_terminal_alone(monkeypatch, stream, frames):
    monkeypatch.setattr(sys, "stderr", stream())
    assert list(progress(range(3), desc="features", unit="batch")) == [0, 1, 2]
    assert ("\r" in sys.stderr.getvalue()) == frames and ("features" in sys.stderr.getvalue()) == frames


def test_a_long_stage_says_a_line_at_times_on_a_pipe(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(module, "_EVERY", 1e-9)
    with progress(total=3, desc="images") as bar:
        for _ in range(3):
            bar.set_postfix_str("sd")
            bar.update()
    lines = sys.stderr.getvalue().splitlines()
    assert "\r" not in sys.stderr.getvalue() and lines[-1].startswith("images: 3 of 3, ") and lines[-1].endswith("sd")
