"""measure.py: the peak is seen even when the memory has been given back."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from agentsd.images import measure
from agentsd.images.measure import PeakMemory

# A process of its own: in a test runner, what earlier tests left (garbage, threads of servers that end) may be given
# back in between, by more than the block of this test takes.
OVER = """
import gc, json, torch
from agentsd.images.measure import PeakMemory
torch.ones(8).sum()
gc.collect()
gc.disable()
first = PeakMemory(torch.device("cpu"))
block = torch.ones(256 * 2**20, dtype=torch.uint8)
del block
peaks = [first.peak()]
peaks.append(PeakMemory(torch.device("cpu")).peak())
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_peak_that_is_over():
    done = subprocess.run([sys.executable, "-c", OVER], capture_output=True, text=True, check=True)
    (peak, growth), (later, afterwards) = json.loads(done.stdout)
    assert growth > 200 * 2**20 and peak > growth
    assert afterwards < 50 * 2**20 and later < peak


def test_where_it_cannot_be_told(monkeypatch):
    monkeypatch.setattr(measure, "_reset_resident_peak", lambda: False)
    assert PeakMemory(torch.device("cpu")).peak() == (None, 0)


@pytest.mark.gpu
def test_on_a_gpu(gpu):
    memory = PeakMemory(gpu)
    block = torch.ones(64 * 2**20, dtype=torch.uint8, device=gpu)
    del block
    assert memory.peak()[1] >= 64 * 2**20
