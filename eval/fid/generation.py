"""Generate a scenario's images into a folder of PNGs with a manifest; a stopped run resumes where it was."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from agentsd.files import write_atomically
from agentsd.images.png import save_image
from eval.common.fingerprint import code_fingerprint, package_versions, weights_fingerprint
from eval.common.methods import load_module
from eval.common.models import ModelSpec, load_model
from eval.common.progress import progress
from eval.common.protocol import PROMPT, BenchError, Plan, Sample, Scenario
from eval.common.scenarios import use_scenario

MANIFEST = "manifest.json"
BYTES_PER_PIXEL = 1.5  # a PNG of noise takes twice as much

_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class Job:
    """All the images of a run: a plain value that can be sent to other processes.

    Attributes:
        spec: the model.
        plan: the images.
        scenarios: each with its own folder.
        root: of those folders; all processes must see the same one.
        modules: files that register some of the scenarios' methods, which another process has to load.
    """

    spec: ModelSpec
    plan: Plan
    scenarios: tuple[Scenario, ...]
    root: Path
    modules: tuple[Path, ...] = ()

    def folder(self, scenario: Scenario) -> Path:
        """The folder of a scenario's images."""
        return self.root / scenario.name

    def paths(self, scenario: Scenario) -> list[Path]:
        """A scenario's images in the order of the plan."""
        return [self.folder(scenario) / sample.file for sample in self.plan.samples]


def open_folders(pipe: Any, job: Job) -> None:
    """Make or check the folder of every scenario. Raises BenchError as open_folder does."""
    for scenario in job.scenarios:
        open_folder(job.folder(scenario), manifest_of(pipe, scenario, job.plan, job.spec.name))


def missing_images(job: Job) -> int:
    """How many images are missing or damaged."""
    return sum(not is_whole(path) for scenario in job.scenarios for path in job.paths(scenario))


def generate_share(pipe: Any, job: Job, rank: int = 0, processes: int = 1, parent: int | None = None) -> int:
    """Generate what is missing of this process's share of the images, in folders that open_folders has made.

    However often a run was stopped, and with any number of processes, the folders end up the same: a batch holds the
    same images whichever process generates it, and a damaged file is generated again.

    Args:
        pipe: an unpatched text-to-image pipeline.
        rank, processes: this process generates every processes-th batch, starting with the rank-th.
        parent: stop when this process, which started ours, has ended.

    Returns:
        How many images this process generated.

    Raises:
        BenchError: a folder cannot be written to, or the disk is full.
    """
    todo = []
    for scenario in job.scenarios:
        folder = job.folder(scenario)
        for batch in job.plan.batches[rank::processes]:
            if missing := {sample for sample in batch if not is_whole(folder / sample.file)}:
                todo.append((scenario, batch, missing))
    total = sum(len(missing) for _, _, missing in todo)
    share = f" (process 1 of {processes})" if processes > 1 else ""
    bar = progress(total=total, desc="generating" + share, unit="image", disable=rank > 0 or not total)
    with bar, _threads(job.plan.threads if pipe.unet.device.type == "cpu" else None):
        for scenario, batch, missing in todo:
            bar.set_postfix_str(scenario.name)
            for sample, image in zip(batch, generate_batch(pipe, scenario, job.plan, batch)):
                if parent is not None and os.getppid() != parent:
                    raise SystemExit(1)
                if sample in missing:
                    _save(image, job.folder(scenario) / sample.file, sample)
                    bar.update()
    return total


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Set the number of PyTorch's CPU threads; afterwards it is as before, as timing and report expect."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def generate_all(pipe: Any, job: Job, processes: int | None = None) -> None:
    """Generate what is missing, on a CPU in several processes; None takes as many as it has cores and memory for.

    Raises BenchError as generate_share and generate_in_processes.
    """
    count = processes or _processes_that_fit(pipe)
    if count > 1 and pipe.unet.device.type == "cpu" and missing_images(job):
        generate_in_processes(job, count)
    else:
        generate_share(pipe, job)


def _processes_that_fit(pipe: Any) -> int:
    """How many processes may run on this CPU: one per core, as long as each can hold model and images."""
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    weights = sum(weight.numel() * weight.element_size() for part in networks for weight in part.parameters())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1
    return int(np.clip(free // (3 * weights + 10**9), 1, cores))


def generate_in_processes(job: Job, processes: int) -> None:
    """generate_share in several processes of this machine, for CPUs: one thread each is faster than many in one.

    Raises BenchError where one of them failed; its images are kept.
    """
    context = torch.multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_work, args=(job, rank, processes, os.getpid()), daemon=True)
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed := [str(worker.exitcode) for worker in workers if worker.exitcode]:
        raise BenchError(
            f"{len(failed)} of {processes} generating processes failed (exit code {', '.join(failed)}; see above): "
            "give the same command again to resume, with fewer --processes if memory ran out"
        )


def _work(job: Job, rank: int, processes: int, parent: int) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(job.plan.threads)
    try:
        for path in job.modules:
            load_module(path)
        generate_share(load_model(job.spec), job, rank, processes, parent)
    except BenchError as error:
        print(f"generating: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(1) from None


def generate_batch(pipe: Any, scenario: Scenario, plan: Plan, batch: Sequence[Sample]) -> list[Image.Image]:
    """Call the pipeline once: the images of a batch, each from noise of its own seed, sampled on the CPU."""
    with use_scenario(pipe, scenario) as call:
        return call(
            [sample.prompt for sample in batch],
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance,
            height=plan.size,
            width=plan.size,
            generator=[torch.Generator("cpu").manual_seed(sample.seed) for sample in batch],
        ).images


def manifest_of(pipe: Any, scenario: Scenario, plan: Plan, model: str) -> dict[str, Any]:
    """Everything that decides what a folder's images look like, as JSON would return it."""
    on_cpu = pipe.unet.device.type == "cpu"
    settings = {
        "scenario": scenario.name,
        "method": scenario.method,
        "patch": scenario.config and asdict(scenario.config),
        "interval": scenario.interval,
        **({"settings": scenario.options} if scenario.own else {}),
        "model": model,
        "weights": weights_fingerprint(pipe),
        "scheduler_config": {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")},
        **{key: value for key, value in asdict(plan).items() if key not in ("samples", "classes", "threads")},
        "threads": plan.threads if on_cpu else None,
        "prompt": PROMPT,
        "classes": [name for _, name in plan.classes],
        "device": pipe.unet.device.type,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "versions": package_versions(),
        "code": code_fingerprint(scenario.method),
    }
    return json.loads(json.dumps(settings, default=str))


def open_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """Make a folder for images with these settings, or check that those in it have the same.

    Raises BenchError where it was made with other settings or cannot be written to.
    """
    path = folder / MANIFEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):  # of a process that was killed while saving an image
            leftover.unlink()
        if path.is_file():
            _compare(folder, json.loads(path.read_text()), manifest)
        else:
            if strangers := [entry.name for entry in folder.iterdir() if entry.suffix == ".png"]:
                raise BenchError(
                    f"{folder} has images ({strangers[0]} …) but no {MANIFEST}, so their settings are unknown: "
                    "give another --out"
                )
            write_atomically(path, json.dumps(manifest, indent=1) + "\n")
    except json.JSONDecodeError as error:
        raise BenchError(f"{path} is damaged ({error}): remove the folder, or give another --out") from error
    except OSError as error:
        raise _unwritable(folder, error) from error


def check_space(folder: Path, images: int, pixels: int) -> None:
    """Check that a folder can be written to and its disk has room for so many images.

    Raises BenchError where it cannot, or has not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe{os.getpid()}.tmp"
        probe.write_bytes(b"0")
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _unwritable(folder, error) from error
    needed = images * pixels * BYTES_PER_PIXEL
    if free < needed:
        raise BenchError(
            f"{folder} has {free / 1e9:.2f} GB free, {images} images need about {needed / 1e9:.2f} GB: make room, "
            "or give an --out on another disk"
        )


def is_whole(path: Path) -> bool:
    """Whether a PNG exists and is complete: the checksums of all its chunks are right."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(_PNG_END), os.SEEK_END)
            if file.read() != _PNG_END:  # Pillow does not check the last checksum
                return False
        with Image.open(path) as image:
            image.verify()
    except Exception:  # Pillow raises many kinds for damaged files
        return False
    return True


def _compare(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in [*wanted, *(key for key in found if key not in wanted)]:
        if found.get(key) != wanted.get(key):
            theirs, ours = found.get(key), wanted.get(key)
            if isinstance(theirs, dict) and isinstance(ours, dict):
                name = next(name for name in [*ours, *theirs] if theirs.get(name) != ours.get(name))
                key, theirs, ours = f"{key}.{name}", theirs.get(name), ours.get(name)
            raise BenchError(
                f"{folder} was generated with another {key} ({_brief(theirs)}, now {_brief(ours)}): give the settings "
                "it was generated with, or another --out"
            )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _save(image: Image.Image, path: Path, sample: Sample) -> None:
    try:
        save_image(image, path, {"prompt": sample.prompt, "class": sample.index, "seed": sample.seed})
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> BenchError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BenchError(f"the disk of {folder} is full: make room and give the same command again to resume")
    return BenchError(f"{folder} cannot be written to ({error.strerror or error}): give another --out")
