"""run: from the arguments to the report, stage by stage; what a stage has made is not made again."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
from pathlib import Path
from typing import Any

import diffusers
import transformers

from agentsd.files import write_atomically
from agentsd.images.pipelines import SCHEDULERS, choose_dtype
from eval.common.environment import environment
from eval.common.fingerprint import package_versions
from eval.common.models import pick_device
from eval.common.processes import claim, lock_folder, run_python
from eval.common.protocol import BenchError
from eval.fid.features import check_features
from eval.fid.images import read_image

from . import sample_memory, step_times
from .networks import load_judges, sharpness
from .plan import SUBJECT, Plan
from .report import make_costs, write_report
from .sampling import sample_all, shots_of
from .scoring import score, subject_files
from .trainings import train_all

_PLAN = "plan.json"


def run(options: argparse.Namespace, command: str) -> int:
    """Do all stages and write the report; returns the exit code.

    Raises:
        BenchError: wrong input, a folder that was made with other settings, or a training that failed.
    """
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()  # of the loading of weights, which would cut through ours
        logging.set_verbosity_error()
    plan, out = make_plan(options), Path(options.out).absolute()
    device = check(plan, options)
    with lock_folder(out):
        claim(out, {**plan.as_json(), "versions": package_versions()})
        plan_file = out / _PLAN
        write_atomically(plan_file, json.dumps({"plan": plan.as_json()}) + "\n")
        records = train_all(plan, out)
        steps, note = _step_times(plan_file, out)
        memory = _memory(plan, plan_file, out)
        sample_all(plan, out, plan.rows)
        sample_all(plan, out, plan.prior_rows)
        judges = load_judges(options, device)
        about = {
            "command": command,
            "date": datetime.datetime.now().strftime("%Y-%m-%d"),
            "environment": environment(device, choose_dtype(plan.dtype, device)),
            "label": options.features,
            "notes": [note] if note else [],
            "subject_sharpness": _subject_sharpness(plan, out),
        }
        costs = make_costs(plan, out, records, steps, memory)
        print(write_report(plan, out, about, score(plan, out, judges), costs))
    print(f"report: {out / 'results.md'}")
    return 0


def make_plan(options: argparse.Namespace) -> Plan:
    """The plan that the arguments ask for. Raises BenchError as Plan."""
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(Plan) if field.name != "prompts"}
    fields["subject"] = str(Path(options.subject or SUBJECT).absolute())
    prompts = [prompt.replace("{}", options.instance_prompt) for prompt in options.prompt or ["{}"]]
    return Plan(**fields, prompts=tuple(prompts))


def check(plan: Plan, options: argparse.Namespace) -> Any:
    """Check what can be checked before anything is trained; returns the device.

    Raises:
        BenchError: a wrong option, an unreadable image, or a missing folder or package.
    """
    device = pick_device(plan.device, plan.dtype)
    if plan.scheduler not in SCHEDULERS:
        raise BenchError(f"--scheduler {plan.scheduler!r}: must be one of {', '.join(SCHEDULERS)}")
    check_features(options.features)
    for name in ("clip", "dino"):
        folder = getattr(options, name)
        if folder and not Path(folder).is_dir():
            raise BenchError(f"--{name} {folder}: there is no such folder; give one that the model was saved to")
    for file in subject_files(plan):
        read_image(file)
    return device


def _subject_sharpness(plan: Plan, out: Path) -> float:
    side = read_image(shots_of(plan, plan.rows[0], out)[0].path).width
    return statistics.fmean(sharpness(file, side) for file in subject_files(plan))


def _step_times(plan_file: Path, out: Path) -> tuple[dict[str, list[float]] | None, str]:
    """Seconds of the interleaved training steps; None and why, where two trainings do not fit into memory together."""
    path = out / step_times.FILE
    if not path.is_file():
        print("dreambooth_bench: timing training steps, with and without agents in turns", flush=True)
        try:
            run_python(["-m", "eval.dreambooth.step_times", str(plan_file), str(out)], "the timing of training steps")
        except BenchError as error:
            print(f"dreambooth_bench: {error}", flush=True)
            return None, (
                "Training steps could not be timed in turns (both trainings must fit into memory together); the "
                "seconds are those of the trainings, one after the other."
            )
    return json.loads(path.read_text(encoding="utf-8")), ""


def _memory(plan: Plan, plan_file: Path, out: Path) -> dict[str, int | None]:
    """Peak bytes of sampling by row, each in a process of its own."""
    found = {}
    for row in plan.rows:
        path = out / sample_memory.FOLDER / f"{row.name}.json"
        if not path.is_file():
            run_python(
                ["-m", "eval.dreambooth.sample_memory", str(plan_file), str(out), row.name],
                f"the memory measurement of {row.name}",
            )
        found[row.name] = json.loads(path.read_text(encoding="utf-8"))["peak_bytes"]
    return found
