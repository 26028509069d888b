"""The output folder: which runs may use it, what it records of one (training.json), and whether there is room."""

from __future__ import annotations

import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from agentsd.files import write_atomically

from .schedules import ENDLESS
from .settings import DreamBoothSettings, UsageError, option

RECORD = "training.json"
CHECKPOINTS = "checkpoints"

_FREE = (
    "output_dir instance_data_dir class_data_dir resume_from_checkpoint device checkpointing_steps "
    "checkpoints_total_limit validation_prompt num_validation_images validation_steps validation_inference_steps "
    "class_inference_steps guidance_scale"
).split()
"""Settings that may differ when a run goes on: none changes the weights. Images are compared by their content."""


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    paths = [path for path in (folder / CHECKPOINTS).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in paths if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """How many steps were done when a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def how_to_go_on(folder: Path) -> str:
    """What to do about a run in a folder that has stopped: "go on with …", or "give the same command, …"."""
    found = list_checkpoints(folder)
    if not found:
        return "give the same command, which begins anew, as there is no checkpoint yet; class images are kept"
    return f"go on with --resume-from-checkpoint latest, after step {step_of(found[-1])}"


def recorded_settings(settings: DreamBoothSettings, precision: str, processes: int) -> dict[str, Any]:
    """The settings as training.json has them."""
    return {**settings.as_json(), "mixed_precision": precision, "processes": processes}


def check_output(settings: DreamBoothSettings, recorded: dict[str, Any]) -> dict[str, Any] | None:
    """Make sure that nothing in --output-dir would be overwritten; returns the record of the run to go on with.

    It is None where there is none yet, also with --resume-from-checkpoint latest: one command starts a job and restarts
    it.

    Raises:
        UsageError: the folder has something else in it, another run, or this one without being asked to go on.
    """
    folder: Any = settings.output_dir
    name = f"--output-dir {folder}"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{name}: is a file; give the name of a folder")
    record = read_record(folder)
    if record is None:
        if folder.exists() and any(not path.name.startswith(".agentsd-") for path in folder.iterdir()):
            raise UsageError(
                f"{name}: has other files in it, which would be overwritten; give a new or an empty folder"
            )
        if settings.resume_from_checkpoint not in (None, "latest"):
            raise UsageError(
                f"--resume-from-checkpoint {settings.resume_from_checkpoint}: {folder} has no run to go on with; give "
                "the --output-dir of that run, or leave --resume-from-checkpoint out"
            )
        return None
    before = record.get("settings", {})
    for key, value in recorded.items():
        if key in _FREE or (key == "max_train_steps" and settings.lr_scheduler in ENDLESS):
            continue
        if before.get(key) != value:
            raise UsageError(
                f"{name}: has a run with another {key} ({_brief(before.get(key))}, not {_brief(value)}); give the "
                f"settings of that run, or another --output-dir"
            )
    if not settings.resume_from_checkpoint and (record.get("finished") or list_checkpoints(folder)):
        raise UsageError(
            f"{name}: has this very run already; add --resume-from-checkpoint latest to go on with it, or give another "
            "--output-dir"
        )
    return record


def read_record(folder: Path) -> dict[str, Any] | None:
    """training.json of a folder, or None. Raises UsageError where it is damaged."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict) or "settings" not in record:
        raise UsageError(f"--output-dir: {path} is no record of a training; give another folder")
    return record


def write_record(folder: Path, **content: Any) -> None:
    """Write training.json atomically."""
    write_atomically(folder / RECORD, json.dumps({**content, "versions": versions()}, indent=1) + "\n")


def claim_output(folder: Path, recorded: dict[str, Any]) -> None:
    """Make the folder and write the record of a run with no step done.

    Raises:
        UsageError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_record(folder, settings=recorded, finished=False, steps=0)
    except OSError as error:
        raise UsageError(
            f"--output-dir {folder}: cannot be written to ({error.strerror}); give a folder that you may write to"
        ) from None


def check_room(folder: Path, needed: int) -> None:
    """Make sure that the disk has room for `needed` bytes, less what the folder has already. Raises UsageError."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    free = shutil.disk_usage(existing).free
    if free < needed - present:
        raise UsageError(
            f"{option('output_dir')} {folder}: its disk has {free / 1e9:.2f} GB free, and the model with its "
            f"checkpoints takes {needed / 1e9:.2f} GB; make room, or give a folder on another disk"
        )


def versions() -> dict[str, str]:
    """Versions of the packages that decide the result."""
    found = {}
    for name in ("agentsd", "torch", "diffusers", "transformers", "accelerate", "peft"):
        try:
            found[name] = version(name)
        except ModuleNotFoundError:  # importlib.metadata.PackageNotFoundError is one
            continue
    return found


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
