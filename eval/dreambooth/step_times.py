"""Seconds of a training step with and without agents: two trainers in one process that take turns.

`python -m eval.dreambooth.step_times PLAN.json OUT` writes OUT/step_times.json; dreambooth_bench runs it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from agentsd.config import FIELD_NAMES
from agentsd.files import write_atomically
from agentsd.images.rounds import rotated

from .plan import Plan, plan_from

FILE = "step_times.json"
_WARM_UP = 2


def measure_steps(trainers: Mapping[str, Any], rounds: int) -> dict[str, list[float]]:
    """Time one step of each trainer a round, in an order that rotates, after a warm-up of two steps each.

    Args:
        trainers: name to a prepared Trainer.
        rounds: timed steps of each.
    """
    names = list(trainers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-_WARM_UP, rounds):
        for name in rotated(names, number):
            _synchronize()
            before = time.perf_counter()
            trainers[name].step()
            _synchronize()
            if number >= 0:
                seconds[name].append(time.perf_counter() - before)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_trainers(plan: Plan, out: Path) -> dict[str, Any]:
    """The trainers of "none" and "both", prepared."""
    from dreambooth.training import Trainer

    trainers = {name: Trainer(training_settings(plan.training_options(name, out))) for name in ("none", "both")}
    for trainer in trainers.values():
        trainer.prepare()
    return trainers


def training_settings(options: dict[str, Any]) -> Any:
    """The DreamBoothSettings that the command makes of these options."""
    from dreambooth.settings import DreamBoothSettings, default_config

    fields = {name: options[name] for name in FIELD_NAMES if name in options and name not in ("seed", "agents")}
    config = default_config(options["agents"], **fields) if fields else None
    return DreamBoothSettings(**{name: options[name] for name in options if name not in fields}, config=config)


def main(arguments: list[str]) -> int:
    """Measure and write; returns the exit code."""
    plan_file, out = Path(arguments[0]), Path(arguments[1])
    plan = plan_from(json.loads(plan_file.read_text(encoding="utf-8"))["plan"])
    seconds = measure_steps(make_trainers(plan, out), plan.timed_steps)
    write_atomically(out / FILE, json.dumps(seconds) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
