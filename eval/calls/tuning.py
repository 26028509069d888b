"""run: `agentsd.tune` on random weights, at several sizes and batch sizes."""

from __future__ import annotations

import argparse
import itertools
import json
from datetime import date

import agentsd
from agentsd.config import PRESETS
from agentsd.files import write_atomically
from agentsd.images.tune import BESIDE_PRESETS

from ..common.environment import commit
from ..common.models import random_pipeline


def run(options: argparse.Namespace, command: str) -> None:
    """Tune and print; with --out write tune-MODEL-SIZE-BATCH.json for each and tune-MODEL.md for all."""
    cases = list(itertools.product(options.sizes, options.batch_sizes))
    if options.dry_run:
        tried = ["unpatched", *PRESETS, *BESIDE_PRESETS]
        for size, batch in cases:
            print(f"{options.random_weights}, {size} px, {batch} at once, {options.steps} steps: {', '.join(tried)}")
        return
    pipe = random_pipeline(options.random_weights, options.device, options.dtype)
    said, rows = [f"`{command}`, {date.today()}, commit {commit()}. Random weights."], []
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    for size, batch in cases:
        tuning = agentsd.tune(pipe, size, size, steps=options.steps, batch_size=batch, rounds=options.rounds)
        print(tuning, tuning.share(), sep="\n\n", end="\n\n", flush=True)
        said += ["```", str(tuning), "```"]
        rows.append(tuning.share())
        if options.out:  # at once: a lent machine may be gone in the midst
            data = json.dumps({"command": command, **tuning.to_dict()}, indent=1) + "\n"
            write_atomically(options.out / f"tune-{options.random_weights}-{size}-{batch}.json", data)
            write_atomically(options.out / f"tune-{options.random_weights}.md", "\n\n".join([*said, *rows]) + "\n")
