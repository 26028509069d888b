"""progress.py: a terminal gets a bar that fits it, anything else a line per run."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from agentsd.images import progress
from agentsd.images.progress import ComparisonProgress, Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Bars:
    """In place of a pipeline: what its progress bar was set to."""

    def set_progress_bar_config(self, **config):
        self.config = config


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_bar_shows_its_rate_at_any_width(monkeypatch, columns):
    pipe, stream = Bars(), Terminal()
    shown = ComparisonProgress(pipe, 999, ("sd", "agentsd"), 3, stream)
    monkeypatch.setattr(Progress, "_columns", lambda self: columns)
    shown("agentsd", 1)
    shown("sd", 1)  # by now the label has the time left too
    stream.truncate(0)
    with tqdm(total=999, file=stream, ncols=columns, mininterval=0, initial=990, **pipe.config) as bar:
        time.sleep(0.05)
        bar.update(8)
    frames = [frame.strip() for frame in stream.getvalue().replace("\x00", "").split("\r") if "998/999" in frame]
    assert frames and "it/s" in frames[-1] and frames[-1].startswith("Stable Diffusion") and len(frames[-1]) <= columns


def test_no_bar_off_a_terminal():
    pipe, stream = Bars(), io.StringIO()
    Progress(pipe, 25, stream).single("AgentSD")
    assert pipe.config == {"disable": True} and stream.getvalue() == "AgentSD: 25 steps …\n"


def test_time_left_counts_the_rounds_that_will_be_run(monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    stream = io.StringIO()
    shown = ComparisonProgress(Bars(), 50, ("sd", "agentsd"), None, stream)
    for method, number, seconds in [("sd", 0, 3), ("agentsd", 0, 3), ("agentsd", 1, 80), ("sd", 1, 120)]:
        shown(method, number)
        clock.now += seconds
    shown("sd", 2)
    assert shown.total_rounds() == 2  # one more takes it past five minutes, as compare_methods counts
    clock.now += 100
    shown("agentsd", 2)
    clock.now += 100
    shown.finish()
    assert stream.getvalue().splitlines() == [
        "2 methods, 3 rounds of 50 steps, after a warm-up",
        "Stable Diffusion, warm-up: 3.00 s",
        "AgentSD, warm-up: 3.00 s",
        "AgentSD, round 1 of 3: 80.00 s; 7 min left in all",
        "Stable Diffusion, round 1 of 2: 120.00 s; 3 min left in all",
        "Stable Diffusion, round 2 of 2: 100.00 s; 2 min left in all",
        "AgentSD, round 2 of 2: 100.00 s",
        "7 min in all",
    ]


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 89, 91, 3600, 9000)] == ["0 s", "89 s", "2 min", "60 min", "2.5 h"]
