"""eval/calls/unet_calls.py and call_tables.py: what kinds of calls come to; no time is asserted."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import make_pipeline
from diffusers import DDIMScheduler

import agentsd
from agentsd.patch import get_patch
from eval import call_bench
from eval.calls import unet_calls
from eval.calls.call_tables import seconds_of_run
from eval.calls.methods import COLUMNS
from eval.common.fair_schedules import Run
from eval.common.operations import TensorWatch


def test_memory_is_of_the_tensors_alive_at_once():
    with TensorWatch() as watch:
        first = torch.ones(1000)
        second = first + 1
        del first
        third = second.view(10, 100) * 2
        third.add_(1)
        del second
    assert watch.peak == 8000 and watch.operations == 4 and third.shape == (10, 100)


@pytest.mark.parametrize("column", [one for one in COLUMNS if "preset" in one.name], ids=lambda one: one.name)
def test_time_of_a_run_is_that_of_its_calls(column):
    """Against the calls of a pipeline, one by one."""
    pipe = make_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    median = {f"{column.method}, {kind}, {phase}": 10.0 ** (power + 2 * (kind == "cached"))
              for kind in ("whole", "cached") for power, phase in enumerate(("agent", "merge"))}  # fmt: skip
    seconds, whole, calls = seconds_of_run(column, Run("ddim", 25), pipe, median)

    settings = {**unet_calls.METHODS[column.method], "cache_interval": column.interval}
    config = agentsd.AgentConfig(**settings)
    agentsd.apply_patch(pipe, config)
    naive: list[str] = []

    def note(*_):
        last = get_patch(pipe.unet).last_call
        naive.append(
            f"{column.method}, {'cached' if last.cached else 'whole'}, {config.phase_at(last.timestep, 1000).value}"
        )

    pipe.unet.register_forward_hook(note)
    pipe("", num_inference_steps=25, height=128, width=128, output_type="latent")
    assert (seconds, whole, calls) == (
        pytest.approx(sum(median[name] for name in naive)),
        sum("whole" in name for name in naive),
        25,
    )


def test_a_row_has_all_its_columns_from_one_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(unet_calls, "random_pipeline", lambda *_: make_pipeline())
    call_bench.main(["--size", "64", "--rounds", "2", "--runs", "ddim:6", "--dtype", "float32", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "sd15-64.json").read_text())
    assert {len(values) for values in found["seconds"].values()} == {2}
    assert set(found["memory"]) == {"sdpa", *unet_calls.METHODS} and min(found["memory"].values()) > 0
    text = (tmp_path / "sd15-64.md").read_text()
    assert text.endswith(capsys.readouterr().out.partition("`python")[2][-200:].rstrip() + "\n")
    row = re.search(r"^\| UNet calls, ddim, 6 steps \|(.*)\|$", text, re.MULTILINE)
    assert row is not None and row[1].count("×") == len(COLUMNS)
