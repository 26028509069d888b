"""gate_stage: whether a probe can judge attention methods: what it loses without attention, and how sharp that is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentsd import AgentConfig
from agentsd.files import write_atomically
from eval.common.protocol import SD, BenchError, Scenario
from eval.common.scenarios import full_resolution_layers
from eval.common.tables import markdown
from eval.denoising.inputs import FEWEST, Inputs, load_inputs
from eval.denoising.judged import Judged, load_judged
from eval.denoising.losses import losses_at, noise_of
from eval.denoising.statistics import rise_of
from eval.gate.effective_keys import RecordingProcessor

TIMESTEPS = (60, 170, 280, 390, 500, 610, 720, 830, 940)
LEAST_RISE = {"mean-value": 0.25, "no-attention": 0.5}
MOST_KEYS = 1 / 4
"""Largest median number of effective keys, as a fraction of N, as the demo model's gate has it."""

_SEED = 1  # of images and noise; eval/denoising_loss.py takes 0 by default
_KEY_SAMPLES = 8


def gate_stage(out: Path, samples: int = 96) -> bool:
    """Judge the model in `out/model`; print gate.md and write it with gate.json. Returns whether every bar is met.

    Raises:
        BenchError: the folder holds no probe, or its loss is not finite.
    """
    if samples < FEWEST:
        raise BenchError(f"--samples {samples}: must be at least {FEWEST}")
    if not (out / "model" / "model_index.json").is_file():
        raise BenchError(f"{out / 'model'} cannot be loaded: run the stage train with this --out first")
    judged = load_judged(str(out / "model"), device="cpu")
    inputs = load_inputs(judged, None, None, samples, _SEED)
    rows = [_row(judged, inputs, timestep) for timestep in TIMESTEPS]
    passed = all(row["met"] for row in rows)
    write_atomically(out / "gate.json", json.dumps({"passed": passed, "rows": rows}, indent=1) + "\n")
    text = as_markdown(rows, samples, passed)
    write_atomically(out / "gate.md", text)
    print(text)
    return passed


def as_markdown(rows: Sequence[dict[str, Any]], samples: int, passed: bool) -> str:
    """The gate as text."""
    tokens = rows[0]["tokens"]
    lines = [
        f"Gate: {'passed' if passed else 'not passed'}, {sum(row['met'] for row in rows)} of {len(rows)} timesteps "
        f"meet all bars. {samples} unseen images. Bars: the mean value in attention's place raises the loss by "
        f"{LEAST_RISE['mean-value']:.0%} or more, no attention by {LEAST_RISE['no-attention']:.0%} or more, and the "
        f"median of effective keys of the sharpest layer is at most {MOST_KEYS:g} of N = {tokens}.",
        "",
    ]
    cells = []
    for row in rows:
        rises = (f"{100 * row[name][0]:+.0f} ± {100 * row[name][1]:.0f} %" for name in LEAST_RISE)
        keys = ", ".join(f"{median:.0f}" for median in row["keys"].values())
        met = "yes" if row["met"] else "no"
        cells.append([row["timestep"], f"{row['loss']:.4f}", *rises, keys, met])
    heading = ["t", "loss", "mean value", "no attention", "effective keys by layer, median", "met"]
    return "\n".join([*lines, markdown(heading, cells, "rrrrrl")]) + "\n"


def _row(judged: Judged, inputs: Inputs, timestep: int) -> dict[str, Any]:
    unpatched = losses_at(judged, inputs, SD, timestep, _SEED)
    row: dict[str, Any] = {"timestep": timestep, "loss": float(unpatched.mean())}
    met = True
    for name, least in LEAST_RISE.items():
        scenario = Scenario(name, AgentConfig(early=1.0))
        rise = rise_of(losses_at(judged, inputs, scenario, timestep, _SEED), unpatched)
        row[name] = [rise.value, rise.standard_error]
        met = met and rise.value >= least
    row["keys"], row["tokens"] = effective_keys_at(judged, inputs.take(range(min(_KEY_SAMPLES, len(inputs)))), timestep)
    return row | {"met": met and min(row["keys"].values()) <= MOST_KEYS * row["tokens"]}


def effective_keys_at(judged: Judged, inputs: Inputs, timestep: int) -> tuple[dict[str, float], int]:
    """Median over images and queries of the number of effective keys, by layer, and N."""
    layers = full_resolution_layers(judged.pipe)
    recorders = {name: RecordingProcessor(layer.processor) for name, layer in layers.items()}
    noise = torch.stack([noise_of(inputs.latents.shape[1:], _SEED, key, timestep) for key in inputs.keys])
    try:
        for name, layer in layers.items():
            layer.processor = recorders[name]
        judged.predict_noise(judged.add_noise(inputs.latents, noise, timestep), timestep, inputs)
    finally:
        for name, layer in layers.items():
            layer.processor = recorders[name].original
    medians = {name: float(np.median(torch.cat(found.found).numpy())) for name, found in recorders.items()}
    return medians, next(iter(recorders.values())).num_tokens
