"""measure.py: the peak is seen even when the memory has been given back."""

from __future__ import annotations

import sys

import pytest
import torch

from agentsd import measure
from agentsd.measure import PeakMemory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_peak_that_is_over():
    memory = PeakMemory(torch.device("cpu"))
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    peak, growth = memory.peak()
    assert growth > 50 * 2**20 and peak > growth
    later, growth = PeakMemory(torch.device("cpu")).peak()
    assert growth < 20 * 2**20 and later < peak


def test_where_it_cannot_be_told(monkeypatch):
    monkeypatch.setattr(measure, "_reset_resident_peak", lambda: False)
    assert PeakMemory(torch.device("cpu")).peak() == (None, 0)


@pytest.mark.gpu
def test_on_a_gpu(gpu):
    memory = PeakMemory(gpu)
    block = torch.ones(64 * 2**20, dtype=torch.uint8, device=gpu)
    del block
    assert memory.peak()[1] >= 64 * 2**20
