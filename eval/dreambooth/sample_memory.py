"""Peak memory of sampling one image of one row, in a process of its own.

`python -m eval.dreambooth.sample_memory PLAN.json OUT ROW` writes OUT/memory/ROW.json; dreambooth_bench runs it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from agentsd.files import write_atomically
from agentsd.images.generate import run_pipeline
from agentsd.images.methods import use_method
from agentsd.images.warm_up import one_step_per_phase

from .plan import plan_from
from .sampling import load_row, request_of

FOLDER = "memory"


def main(arguments: list[str]) -> int:
    """Measure and write; returns the exit code."""
    plan_file, out, name = Path(arguments[0]), Path(arguments[1]), arguments[2]
    plan = plan_from(json.loads(plan_file.read_text(encoding="utf-8"))["plan"])
    row = next(row for row in plan.rows if row.name == name)
    pipe = load_row(plan, row, out)
    request = request_of(plan, plan.prompts[0], plan.seed)
    # One step of each phase needs as much memory as all of them.
    with use_method(pipe, *row.method), one_step_per_phase(pipe, row.config) as steps:
        _, _, peak = run_pipeline(pipe, replace(request, steps=steps))
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    write_atomically(out / FOLDER / f"{name}.json", json.dumps({"peak_bytes": peak}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
