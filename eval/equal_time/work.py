"""run: what eval/pareto.py does with its arguments."""

from __future__ import annotations

import argparse
import re
import shutil
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from eval.common.environment import commit, device_name
from eval.common.fair_schedules import parse_runs
from eval.common.models import ModelSpec, load_model, native_size
from eval.common.protocol import PROMPT, BenchError, choose_classes, demo_classes

from . import call_times
from .generation import RESULTS, Sampling, generate_all, images_of, read
from .line import MEASURED, compare, on_common_images
from .page import tables, write_page
from .rows import rows_of


def run(options: argparse.Namespace, command: str) -> None:
    """Generate what is missing and write the page. Raises BenchError for wrong input."""
    if options.call_times:
        call_times.store()
        return
    if options.size and options.size % 8:
        raise BenchError(f"--size {options.size}: must be a multiple of 8 (one latent pixel is 8 × 8 pixels)")
    runs = parse_runs(options.runs)
    names = dict.fromkeys(row.name for run in runs for row in rows_of(run, options.fewer, options.intervals))
    # A row that other --fewer or --intervals have is left out already; a misspelt one would be run.
    kinds = {re.sub(r"\d+", "N", name) for name in names}
    if unknown := [name for name in options.leave_out if re.sub(r"\d+", "N", name) not in kinds]:
        raise BenchError(f"--leave-out {unknown[0]!r}: is no row here; the rows are {', '.join(names)}")
    rows = {run: rows_of(run, options.fewer, options.intervals, options.leave_out) for run in runs}
    times = call_times.load()
    images = images_of(_prompts(options))
    if options.only != "all":
        images = [image for image in images if image.chooses == (options.only == "choice")]
    if not options.report_only:
        if options.threads:
            torch.set_num_threads(options.threads)
        pipe = load_model(ModelSpec(options.model, None, None, options.device, options.dtype))
        size = options.size or native_size(pipe)
        options.out.mkdir(parents=True, exist_ok=True)
        first, of = options.share
        sampling = Sampling(options.model, options.guidance, size)
        generate_all(pipe, rows, images[first - 1 :: of], sampling, options.out)
    results = read(options.out)
    measured = options.measured or torch.cuda.is_available()
    sets: dict[str, list[dict[str, Any]]] = {}
    for name in ("check", "choice"):
        own = [one for one in results if one["chooses"] == (name == "choice")]
        sets[name] = [entry for run in rows for entry in compare(run, rows[run], own, times, measured)]
    if not any(sets.values()):
        raise BenchError(f"{options.out}: no image has all rows yet: give the same command without --report-only")
    machines = [MEASURED] * measured + [call_times.CPU, *call_times.GPUS_SHOWN]
    check = [one for one in results if not one["chooses"]]
    charted = [
        entry
        for run, own in rows.items()
        for entry in compare(run, own, on_common_images(run, own, check), times, measured)
    ]
    shown = [name for name in machines if name in (MEASURED, call_times.CPU, "A100")]
    write_page(options.page or options.out, _about(options, command), sets, machines, charted, shown)
    if options.page and options.page.resolve() != options.out.resolve():
        shutil.copyfile(options.out / RESULTS, options.page / RESULTS)
    for name, entries in sets.items():
        for run in dict.fromkeys(entry["run"] for entry in entries):
            own = [entry for entry in entries if entry["run"] == run]
            print(f"{run} ({name})\n{tables(own, machines)}\n")


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.prompts is None:
        return [PROMPT.format(name) for _, name in choose_classes(demo_classes(), options.images)]
    try:
        lines = Path(options.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"--prompts {options.prompts}: cannot be read ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if len(prompts) < options.images:
        raise BenchError(f"--prompts {options.prompts}: has {len(prompts)} prompts, --images asks for {options.images}")
    return prompts[: options.images]


def _about(options: argparse.Namespace, command: str) -> dict[str, Any]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "DeepCache", "tomesd"))
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    said = [
        f"{date.today()}, {device}, {versions}, commit {commit()}.",
        f"Model {options.model}, guidance {options.guidance:g}, one image a prompt.",
        "Distances are to the unpatched image of the full run, of the same prompt and seed: PSNR, SSIM, FLIP (67 "
        "pixels per degree) and the length of the difference of EfficientNet-Lite0's features in lengths of those of "
        "the full run's image. All schedules begin at one noise level for all numbers of steps (DDIM and PLMS: "
        "trailing spacing; the others: linspace). Time is that of the UNet's calls, in steps of the unpatched model. "
        "CPU: from call times of SD 1.5's UNet at 512 px on 2 cores of a shared AMD EPYC machine "
        "(step-caching/sd15-512.json); RTX 3060, RTX 4090 and A100: forecasts, nothing is measured on a GPU.",
        "*Nearer than fewer steps in the same time*: the unpatched model with as many steps as the row's time buys, "
        "interpolated for each image; median over images of the difference, positive where the row is nearer, its 95 % "
        "interval by order statistics (6 images or more), the worst, and on how many images the row is nearer. A dash "
        "where the line of fewer steps does not reach.",
    ]  # fmt: skip
    if (options.size or 512) != 512 or options.model != "demo":
        said.append(
            "The times of the CPU and the GPUs are those of SD 1.5 at 512 px also here: of another model or size "
            '"in the same time" holds for the measured seconds alone (--measured; on a GPU always).'
        )
    return {"command": command, "model": options.model, "guidance": options.guidance, "said": said}
