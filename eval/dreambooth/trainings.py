"""train_all: run apps/dreambooth.py for each training that is not finished, and read what it recorded."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from eval.common.files import read_json
from eval.common.processes import run_python
from eval.common.protocol import BenchError
from eval.launch import REPOSITORY

from .plan import TRAININGS, Plan

_RECORD = "training.json"


def train_all(plan: Plan, out: Path) -> dict[str, dict[str, Any]]:
    """Train what is missing, one after the other; a training that was stopped goes on.

    Returns:
        name of the training -> its training.json.

    Raises:
        BenchError: a training failed.
    """
    for name in plan.trainings:
        options = plan.training_options(name, out)
        record = _read(out, name)
        if record is not None and record.get("finished"):
            continue
        arguments = [str(REPOSITORY / "apps" / "dreambooth.py"), *command_line(options)]
        if record is not None:
            arguments += ["--resume-from-checkpoint", "latest"]
        print(f"dreambooth_bench: training {TRAININGS[name]}", flush=True)
        run_python(arguments, f"the training {TRAININGS[name]}")
    return read_records(plan, out)


def command_line(options: dict[str, Any]) -> list[str]:
    """Options by name -> arguments of apps/dreambooth.py."""
    arguments = []
    for name, value in options.items():
        arguments.append("--" + name.replace("_", "-"))
        arguments += [] if value is True else [str(value)]
    return arguments


def read_records(plan: Plan, out: Path) -> dict[str, dict[str, Any]]:
    """What each training recorded. Raises BenchError where one is not finished."""
    records = {}
    for name in plan.trainings:
        record = _read(out, name)
        if record is None or not record.get("finished"):
            raise BenchError(f"{out / 'models' / name}: the training {TRAININGS[name]} is not finished")
        records[name] = record
    return records


def median_step(record: dict[str, Any]) -> float:
    """Median seconds of a training step; the first tenth is the warm-up."""
    seconds = record["seconds_per_step"]
    return statistics.median(seconds[len(seconds) // 10 :])


def _read(out: Path, name: str) -> dict[str, Any] | None:
    return read_json(out / "models" / name / _RECORD)
