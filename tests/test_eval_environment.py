"""environment.py: the machine is named, also where it has a GPU that this one lacks."""

from __future__ import annotations

import os

import torch

from eval.common.environment import device_name


def test_a_device_has_a_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device.index}")
    assert device_name(torch.device("cuda", 1)) == "a GPU, 1"
    assert f"({os.cpu_count()} cores)" in device_name(torch.device("cpu"))
