"""run: step caching's settings against the unpatched images: distance at equal whole calls.

Each row is one way to spend fewer whole UNet calls, each image has the seed and prompt of its unpatched twin. Controls:
DeepCache at the same interval, and *fewer steps* without a cache, at as many as take the time of
the cache. All rows have schedules that begin at one noise level for all numbers of steps.
A folder that holds rows of the same model is gone on with: what it has is not generated again, and each row keeps the
date, machine and versions that it was made with.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from DeepCache import DeepCacheSDHelper

import agentsd
from agentsd.files import write_atomically
from agentsd.step_cache import plan_whole_calls
from agentsd.unet import caching
from eval.common.environment import commit, device_name
from eval.common.fair_schedules import FAIR_SCHEDULES, set_fair_schedule, steps_of_equal_time
from eval.common.files import read_json
from eval.common.fingerprint import weights_fingerprint
from eval.common.image_distance import HAS_FLIP, flip, psnr, ssim
from eval.common.progress import progress
from eval.common.protocol import BenchError
from eval.common.tables import markdown, write_json

SUBJECTS = ("zebra", "castle", "goldfish", "mushroom", "bee", "sailboat", "pretzel", "school bus")
NO_AGENTS: dict[str, Any] = {"ratio": 0.0, "early": 0.0}  # the cache alone


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The settings of every row of one table."""
    for scheduler, steps in product(options.schedulers, options.steps):
        spacing = FAIR_SCHEDULES[scheduler][1]["timestep_spacing"]
        base = {"scheduler": scheduler, "steps": steps, "spacing": spacing}
        yield {**base, "method": "agents"}
        for interval in options.intervals:
            yield {**base, "method": "deepcache", "interval": interval}
            yield {**base, "method": "fewer steps", "interval": interval}
            for agents, order in product((False, True), (0, 1)):
                yield {**base, "method": "agents + cache" if agents else "cache", "interval": interval, "order": order}
            if options.extras:
                yield {**base, "method": "cache", "interval": interval, "order": 1, "depth": 2}
                yield {**base, "method": "cache, dense early", "interval": interval, "order": 1}


@contextmanager
def dense_early() -> Iterator[None]:
    """More whole calls in the first 30 % of the run and fewer later: intervals one below and one above the given one.

    The number of whole calls is about that of the interval throughout.
    """

    def plan(phases: tuple, interval: int, steps: int) -> tuple[bool, ...]:
        early = round(0.3 * len(phases))
        first = plan_whole_calls(phases[:early], interval - 1, steps)
        return (*first, *plan_whole_calls(phases[early:], interval + 1, steps))

    with mock.patch.object(caching, "plan_whole_calls", plan):
        yield


@contextmanager
def deepcache(pipe: Any, interval: int) -> Iterator[None]:
    """DeepCache with its own defaults."""
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


def generate(pipe: Any, steps: int, images: int) -> np.ndarray:
    """[images, H, W, 3] in 0 … 1, one prompt and seed each."""
    prompts = [f"a high quality photograph of a {SUBJECTS[i % len(SUBJECTS)]}." for i in range(images)]
    generators = [torch.Generator().manual_seed(i) for i in range(images)]
    return pipe(prompts, num_inference_steps=steps, generator=generators, output_type="np").images


@contextmanager
def whole_calls(pipe: Any) -> Iterator[list[None]]:
    """A list that grows by one with each UNet call that runs the innermost layers."""
    found: list[None] = []
    layer = pipe.unet.down_blocks[-1].resnets[-1].conv1  # DeepCache skips a resnet's forward, and not its hooks
    handle = layer.register_forward_hook(lambda *_: found.append(None))
    try:
        yield found
    finally:
        handle.remove()


def run_row(pipe: Any, row: dict[str, Any], images: int) -> tuple[np.ndarray, int]:
    """The row's images and its number of whole UNet calls."""
    steps, method = row["steps"], row["method"]
    if method == "fewer steps":
        with agentsd.patched(pipe, **NO_AGENTS, cache_interval=row["interval"]), whole_calls(pipe) as whole:
            generate(pipe, steps, 1)
        steps = steps_of_equal_time(steps, len(whole) - (row["scheduler"] == "plms"))  # PLMS calls once more
    with method_of(pipe, row), whole_calls(pipe) as whole:
        return generate(pipe, steps, images), len(whole)


@contextmanager
def method_of(pipe: Any, row: dict[str, Any]) -> Iterator[None]:
    """The row's method on an unpatched pipeline."""
    method = row["method"]
    if method == "deepcache":
        with deepcache(pipe, row["interval"]):
            yield
    elif method == "fewer steps":
        yield
    else:
        fields: dict[str, Any] = {} if "agents" in method else dict(NO_AGENTS)
        if "cache" in method:
            fields |= {"cache_interval": row["interval"], "cache_order": row["order"]}
            fields["cache_depth"] = row.get("depth", "auto")
        with agentsd.patched(pipe, **fields):
            change: AbstractContextManager[None] = dense_early() if "dense early" in method else nullcontext()
            with change:
                yield


def distances(images: np.ndarray, originals: np.ndarray) -> dict[str, Any]:
    """Distances to the unpatched images.

    Returns:
        psnr, psnr_error, psnrs: mean in dB, its standard error, and each image's. ssim: mean. flip: mean, None without
        flip-evaluator.
    """
    pairs = list(zip(images, originals))
    psnrs = np.array([psnr(*pair) for pair in pairs])
    return {
        "psnr": float(psnrs.mean()),
        "psnr_error": float(psnrs.std(ddof=1) / len(psnrs) ** 0.5) if len(psnrs) > 1 else float("nan"),
        "psnrs": [round(float(value), 2) for value in psnrs],
        "ssim": float(np.mean([ssim(*pair) for pair in pairs])),
        "flip": float(np.mean([flip(*pair) for pair in pairs])) if HAS_FLIP else None,
    }


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, a row a result."""
    names = ("scheduler", "steps", "spacing", "method", "interval", "order", "depth", "whole")
    rows = []
    for row in results:
        cells = [str(row.get(name, "")) for name in names]
        cells += [f"{row['psnr']:.1f} ± {row['psnr_error']:.1f}", f"{row['ssim']:.3f}"]
        cells.append("" if row["flip"] is None else f"{row['flip']:.4f}")
        rows.append(cells)
    return markdown([*names, "PSNR, dB", "SSIM", "FLIP"], rows) + "\n"


def run(options: argparse.Namespace, command: str) -> None:
    """Generate what is missing, write rows.json, rows.csv and rows.md, and print the table.

    Raises:
        BenchError: a scheduler is not known, or the folder has rows of another model.
    """
    for name in options.schedulers:
        if name not in FAIR_SCHEDULES:
            raise BenchError(f"--schedulers {name}: must be of {', '.join(FAIR_SCHEDULES)}")
    load = lambda: agentsd.load_pipeline(options.model)  # noqa: E731
    weights = weights_fingerprint(load())
    known = kept_rows(options.out, options.model, weights)
    options.out.mkdir(parents=True, exist_ok=True)
    originals: dict[tuple, np.ndarray] = {}
    results = []
    for row in progress(list(rows(options)), unit="row"):
        key = json.dumps({**row, "images": options.images})
        if key not in known:
            pipe = load()
            set_fair_schedule(pipe, row["scheduler"])
            pipe.set_progress_bar_config(disable=True)
            place = row["scheduler"], row["steps"]
            if place not in originals:
                originals = {place: generate(pipe, row["steps"], options.images)}
            images, whole = run_row(pipe, row, options.images)
            measured = distances(images, originals[place])
            made = {"model": options.model, "weights": weights, **setting()}
            known[key] = {"row": json.loads(key), **row, "whole": whole, **measured, **made}
            write(options.out, list(known.values()), command)
        results.append(known[key])
    print(table(results))
    if len(settings := {said(row) for row in results}) > 1:
        print(f"made in {len(settings)} settings: " + "; ".join(sorted(settings)))


def kept_rows(folder: Path, model: str, weights: str) -> dict[str, dict[str, Any]]:
    """The rows that a folder has, by their settings as JSON. Raises BenchError for rows of another or unknown model."""
    found = (read_json(folder / "rows.json") or {"rows": []})["rows"]
    for row in found:
        if (row.get("model"), row.get("weights")) != (model, weights):
            name = row.get("model", "which they do not say")
            what = f"the model {name}" if name != model else f"{model} with other weights"
            raise BenchError(f"{folder} has rows of {what}, and this is {model}: give another --out")
    return {json.dumps(row["row"]): row for row in found}


def setting() -> dict[str, Any]:
    """Date, machine and versions of the rows that are made now."""
    names = ["torch", "diffusers", "DeepCache", *(["flip-evaluator"] if HAS_FLIP else [])]
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    machine = f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, commit {commit()}"
    return {"date": date.today().isoformat(), "machine": machine, "versions": versions}


def said(row: dict[str, Any]) -> str:
    """How a row was made, in one line."""
    return f"{row['model']}, {row['date']}, {row['machine']}, {row['versions']}"


def write(folder: Path, results: list[dict[str, Any]], command: str) -> None:
    """rows.json, rows.csv and rows.md; each row with how it was made."""
    write_json(folder / "rows.json", {"rows": results})
    names = list(dict.fromkeys(name for row in results for name in row if name not in ("row", "psnrs")))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(results)
    write_atomically(folder / "rows.csv", text.getvalue())
    counts = Counter((said(row), row["row"]["images"]) for row in results)
    made = "\n".join(f"- {count} rows, {images} images each: {how}" for (how, images), count in counts.items())
    write_atomically(
        folder / "rows.md",
        f"# Step caching by settings\n\n`{command}`\n\n{made}\n\nDistance to the unpatched image of the same seed, "
        "mean ± standard error over the images. `whole` is the number of whole UNet calls.\n\n" + table(results),
    )
