"""run: from the arguments to the report; a cell, one scenario at one timestep, is measured once and kept on disk."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DDIMScheduler

from agentsd.files import write_atomically
from eval.common.environment import environment
from eval.common.files import read_json
from eval.common.fingerprint import code_fingerprint, effective_code, package_versions, weights_fingerprint
from eval.common.processes import Processes, claim, lock_folder
from eval.common.progress import progress
from eval.common.protocol import BenchError, Scenario, parse_numbers

from .costs import costs_of, measure_times
from .inputs import FEWEST, Inputs, load_inputs
from .judged import Judged, load_judged
from .losses import losses_at
from .report import write_report
from .settings import make_scenarios, name_of
from .statistics import Cells

_OWN_CODE = ("judged.py", "losses.py")  # what the other files make is in the folder's settings


def run(options: argparse.Namespace, command: str) -> int:
    """Measure what is missing and write the report. Returns the exit code.

    Raises:
        BenchError: wrong arguments, or a folder that was made with others.
    """
    for name, value, low in (
        ("samples", options.samples, FEWEST),
        ("batch-size", options.batch_size, 1),
        ("rounds", options.rounds, 0),
    ):
        if value < low:
            raise BenchError(f"--{name} {value}: must be at least {low}")
    if not 0 <= options.seed < 1 << 32:
        raise BenchError(f"--seed {options.seed}: must lie in 0 … {(1 << 32) - 1}")
    if not 1 <= options.steps <= 999:
        raise BenchError(f"--steps {options.steps}: must lie in 1 … 999")
    ratios = parse_numbers("ratios", options.ratios, 0.0, 0.99)
    methods = [part.strip() for part in options.methods.split(",")]
    ablate = [part.strip() for part in options.ablate.split(",") if part.strip()]
    scenarios = make_scenarios(methods, ratios, ablate)
    processes = Processes(options.device)
    rank, count, wait = processes.rank, processes.count, processes.wait
    judged = load_judged(options.model, options.device, options.dtype, options.revision)
    timesteps = sorted(parse_numbers("timesteps", options.timesteps, 0, len(judged.signal) - 1))
    inputs = load_inputs(judged, options.images, options.captions, options.samples, options.seed)
    out = Path(options.out)
    if rank == 0:
        with lock_folder(out):
            claim(out, settings_of(judged, inputs, options.seed))
    wait()
    cells = measure(judged, inputs, scenarios, timesteps, out, options.seed, options.batch_size, rank, count)
    wait()
    if rank == 0:
        if count > 1:
            cells = measure(judged, inputs, scenarios, timesteps, out, options.seed, options.batch_size)
        about = {
            "command": command,
            "model": judged.name,
            "images": len(inputs),
            "seed": options.seed,
            "sampled": sampled_timesteps(judged, options.steps),
            "num_train_timesteps": len(judged.signal),
            "environment": environment(judged.device, judged.dtype),
        }
        times = measure_times(judged, inputs, scenarios, timesteps[-1], options.rounds, out, _code)
        print(write_report(out, about, scenarios, timesteps, cells, costs_of(scenarios, times)))
    return 0


def measure(
    judged: Judged,
    inputs: Inputs,
    scenarios: Sequence[Scenario],
    timesteps: Sequence[int],
    out: Path,
    seed: int = 0,
    batch_size: int = 16,
    rank: int = 0,
    count: int = 1,
) -> Cells:
    """The losses of every scenario at every timestep; what lies in `out/losses` from before is not computed again.

    Args:
        rank, count: this process computes every count-th cell, so that several share the work.

    Returns:
        (name of the scenario, timestep) -> losses [N], of this process's cells.

    Raises:
        BenchError: the unpatched loss is 0, so that nothing can be relative to it.
    """
    cells: Cells = {}
    jobs = [(timestep, scenario) for timestep in timesteps for scenario in scenarios][rank::count]
    for timestep, scenario in progress(jobs, desc="losses", unit="cell", disable=rank > 0):
        name = name_of(scenario)
        path = out / "losses" / name / f"t{timestep:04d}.json"
        code = _code(scenario)
        kept = read_json(path)
        if kept is None or kept["code"] != code:
            start = time.perf_counter()
            losses = losses_at(judged, inputs, scenario, timestep, seed, batch_size)
            kept = {"code": code, "seconds": time.perf_counter() - start, "losses": losses.tolist()}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(kept) + "\n")
        cells[name, timestep] = np.asarray(kept["losses"])
        if scenario.method == "sd" and not cells[name, timestep].mean() > 0:
            raise BenchError(f"{judged.name}: the unpatched loss at timestep {timestep} is 0: leave {timestep} out")
    return cells


def settings_of(judged: Judged, inputs: Inputs, seed: int) -> dict[str, Any]:
    """What the losses in a folder depend on, beside scenario and timestep."""
    return {
        "model": judged.name,
        "weights": weights_fingerprint(judged.pipe),
        "prediction": judged.pipe.scheduler.config.prediction_type,
        "dtype": str(judged.dtype).removeprefix("torch."),
        "device": judged.device.type,
        "seed": seed,
        "images": len(inputs),
        "latents": hashlib.sha256("".join(inputs.keys).encode() + inputs.latents.numpy().tobytes()).hexdigest()[:16],
        "text": hashlib.sha256(inputs.text.numpy().tobytes()).hexdigest()[:16],
        "versions": package_versions(),
    }


def sampled_timesteps(judged: Judged, steps: int) -> list[int]:
    """The timesteps of a DDIM run of so many steps, by which the mean over a run is weighted."""
    scheduler = DDIMScheduler.from_config(judged.pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    return [int(timestep) for timestep in scheduler.timesteps]


def _code(scenario: Scenario) -> str:
    digest = hashlib.sha256((code_fingerprint(scenario.method) or "").encode())
    for name in _OWN_CODE:
        digest.update(effective_code(Path(__file__).with_name(name).read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:16]
