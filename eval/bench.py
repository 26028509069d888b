"""One run of the benchmark from checked arguments to the report: check everything, draw, time, score, report."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import metrics, report
from .generation import Job, check_space, draw_all, draw_share, lock_folder, open_folders
from .latency import Workload, measure
from .models import ModelSpec, load_model, pick_device
from .protocol import (
    DEMO_REFERENCE,
    PROMPT,
    BenchError,
    Plan,
    choose_classes,
    demo_classes,
    imagenet_classes,
    make_scenarios,
    parse_methods,
    parse_ratios,
    tomesd_rivals,
)

_LONGEST_WAIT = timedelta(days=7)  # for the slowest process's share, or the first one's scoring


def run(options: argparse.Namespace, command: str) -> int:
    """Do what the arguments of fid_bench.py say; returns the exit code. Raises BenchError for wrong input."""
    if options.report_only:
        report.write_report(Path(options.report_only))
        print((Path(options.report_only) / "results.md").read_text(encoding="utf-8"))
        return 0
    _check_numbers(options)
    if options.score:
        print(score_two(options))
        return 0
    if options.save_reference:
        return _save_reference(options)
    return _Bench(options, command).run()


class _Bench:
    """The steps of a run; all that can be wrong with the input is found before the first picture is drawn."""

    def __init__(self, options: argparse.Namespace, command: str):
        self.options = options
        self.command = command
        self.processes = _Processes(options.device)
        _check(options)
        random = options.random_weights
        device = self.processes.device or options.device
        self.spec = ModelSpec(options.model, random, options.scheduler, device, options.dtype, options.revision)
        ablate = [name for name in options.ablate.split(",") if name]
        self.timed = make_scenarios(
            parse_methods(options.methods), parse_ratios(options.ratios), options.early, ablate, options.with_deepcache
        )
        # Nobody wants the limit's pictures: it is no way to draw, only the least time a UNet call can take.
        unscored = (options.unscored, "limit")
        drawn = tuple(scenario for scenario in self.timed if scenario.method not in unscored)
        names = demo_classes() if options.model == "demo" and not random else imagenet_classes()
        plan = Plan(
            choose_classes(names, min(options.classes, len(names)) if random else options.classes),
            options.images_per_class, options.steps, options.guidance, options.scheduler, options.size,
            options.batch_size, options.threads, options.seed,
        )  # fmt: skip
        if not options.speed_only and len(plan.pictures) < metrics.FEWEST_PICTURES:
            raise BenchError(
                f"{len(plan.pictures)} pictures are too few for any score, which needs {metrics.FEWEST_PICTURES} at "
                "the very least: raise --classes or --images-per-class"
            )
        self.folder = Path(options.out or f"out/fid_bench-{options.preset}" + ("-speed" if options.speed_only else ""))
        self.job = Job(self.spec, plan, drawn, self.folder / "images")
        self.workloads = _workloads(options)

    def run(self) -> int:
        options, plan, first = self.options, self.job.plan, self.processes.rank == 0
        with lock_folder(self.folder) if first else contextlib.nullcontext():
            scorer = _Scorer(options, plan, self.spec) if first and not options.speed_only else None
            pipe = load_model(self.spec)
            side = plan.size or pipe.unet.config.sample_size * pipe.vae_scale_factor
            if first:
                paths = itertools.chain.from_iterable(map(self.job.paths, self.job.scenarios))
                pictures = 0 if options.speed_only else sum(not path.exists() for path in paths)
                check_space(self.folder, pictures, side**2)
                if not options.speed_only:
                    open_folders(pipe, self.job)
                self._note_run(pipe, side)  # from here on an earlier run's figures are gone
            if not options.speed_only:
                self._draw(pipe)
            if not first:
                return 0
            if not options.quality_only:
                self._time(pipe)
            if scorer is not None:
                del pipe
                scorer.score(self.job, self.folder)
            rows = report.write_report(self.folder)
        found = scorer.found if scorer else {}
        print("\n".join([report.table(rows, found.get("label", "")), "", *report.verdict(rows, found)]))
        print(f"report: {self.folder / 'results.md'}")
        if options.speed_only and not any(row["seconds_per_image"] for row in rows):
            print("fid_bench: nothing could be timed; the table's notes say why", file=sys.stderr)
            return 1
        return 0

    def _note_run(self, pipe: Any, side: int) -> None:
        options, plan = self.options, self.job.plan
        what, sizes, batches = "", [side], [plan.batch_size]
        if options.speed_only:
            sizes = list(dict.fromkeys(workload.size or side for workload in self.workloads))
            batches = list(dict.fromkeys(workload.batch_size for workload in self.workloads))
        else:
            what = f"{len(plan.classes)} classes × {plan.copies}, prompt “{PROMPT}”, "
        found = report.environment(pipe.unet.device, pipe.unet.dtype)
        run = {
            "title": f"fid_bench: {self.spec.name}" + (", speed only" if options.speed_only else ""),
            "command": self.command,
            "protocol": f"{what}{plan.steps} {plan.scheduler} steps, guidance {plan.guidance:g}, "
            f"{', '.join(map(str, sizes))} px, batch {', '.join(map(str, batches))}, seed {plan.seed}."
            + report.timed_apart(
                () if options.speed_only or options.quality_only else self.workloads, side, plan.batch_size
            ),
            "model": self.spec.name,
            "size": side,
            "batch_size": plan.batch_size,
            "scenarios": [report.scenario_row(scenario) for scenario in self.timed],
            "files": [picture.file for picture in plan.pictures][: len(plan.classes)],
            "environment": found,
        }
        report.write_run(self.folder, run)
        for name in (report.LATENCY, report.SCORES):
            (self.folder / name).unlink(missing_ok=True)  # of an earlier run, perhaps with other scenarios

    def _draw(self, pipe: Any) -> None:
        workers = self.processes
        workers.wait()
        if workers.count > 1:
            draw_share(pipe, self.job, workers.rank, workers.count)
        else:
            draw_all(pipe, self.job, self.options.processes)
        workers.wait()

    def _time(self, pipe: Any) -> None:
        timings = []
        total = len(self.timed) * sum(workload.rounds + 1 for workload in self.workloads)
        with tqdm(total=total, desc="timing", unit="call") as bar:
            for workload in self.workloads:

                def show(name: str, number: int, workload: Workload = workload) -> None:
                    bar.set_postfix_str(
                        f"{name}, {workload.size or ''} " + (f"round {number}" if number else "warm-up")
                    )
                    bar.update()

                timings += measure(pipe, self.timed, workload, show)
                report.write_part(self.folder, report.LATENCY, {"timings": [timing.to_dict() for timing in timings]})


class _Scorer:
    """The feature network and the reference, loaded before a picture is drawn; then the scores."""

    def __init__(self, options: argparse.Namespace, plan: Plan, spec: ModelSpec):
        device = pick_device(spec.device)
        self.plan = plan
        self.resamples = options.resamples
        self.clip = metrics.ClipScore(Path(options.clip), device) if options.clip else None
        weights = Path(options.inception_weights) if options.inception_weights else None
        self.network = metrics.load_features(options.features, device, weights)
        self.reference, self.named = _load_reference(options, plan, self.network)
        self.found: dict[str, Any] = {}

    def score(self, job: Job, folder: Path) -> None:
        """Write scores.json."""
        features = {}
        for scenario in tqdm(job.scenarios, desc="features", unit="scenario"):
            features[scenario.name] = self.network.of_files(job.paths(scenario))
        files = {scenario.name: job.paths(scenario) for scenario in job.scenarios}
        rows = metrics.score_sets(
            features, files, self.network, self.reference, self.resamples, tqdm,
            groups=[picture.index for picture in self.plan.pictures], rivals=tomesd_rivals(job.scenarios),
        )  # fmt: skip
        if self.clip is not None:
            prompts = [picture.prompt for picture in self.plan.pictures]
            for name, row in rows.items():
                row["clip_score"] = self.clip.of(files[name], prompts)
        self.found = {
            "features": self.network.name,
            "label": self.network.label,
            "feature_size": self.network.size,
            "reference": self.named,
            "reference_count": self.reference.count,
            "resamples": self.resamples,
            "resampled": "names" if self.plan.copies > 1 and len(self.plan.classes) > 1 else "pictures",
            "rows": rows,
        }
        report.write_part(folder, report.SCORES, self.found)


def score_two(options: argparse.Namespace) -> str:
    """The row of --score A B: the distance of A to B, and their pairwise likeness where the file names are the same.

    Nobody knows which pictures of A show the same, so its interval takes each for a draw of its own.
    """
    device = pick_device(options.device)
    paths = [Path(path) for path in options.score]
    files = [
        None if path.suffix == ".npz" else metrics.reference_files(path, options.reference_per_class) for path in paths
    ]
    weights = Path(options.inception_weights) if options.inception_weights else None
    network = metrics.load_features(options.features, device, weights)
    a, b = (
        metrics.load_statistics(path, network) if own is None else metrics.statistics_of(network.of_files(own, tqdm))
        for path, own in zip(paths, files)
    )
    row = {"scenario": f"{paths[0]} to {paths[1]}", "images": a.count or None}
    key = "fid" if network.name == "inception" else "fd"
    if a.features is not None and len(a.features) == a.count:
        distance = metrics.FrechetDistance(b, device)
        intervals, _ = metrics.bootstrap_distances(distance, {"a": a.features}, resamples=options.resamples)
        row |= intervals["a"].as_row(key)
    else:
        row[key] = metrics.frechet_distance(a, b)
    if a.features is not None and b.features is not None:
        row["kid"], row["kid_deviation"] = metrics.kernel_distance(a.features, b.features)
    if files[0] and files[1] and [path.name for path in files[0]] == [path.name for path in files[1]]:
        with contextlib.suppress(ValueError):  # pictures of different sizes have no PSNR
            row["psnr"], row["ssim"] = metrics.paired_similarity(files[0], files[1])
    return report.table([row], network.label).replace(" to sd", " of pairs")


def _save_reference(options: argparse.Namespace) -> int:
    folder, target = map(Path, options.save_reference)
    if target.suffix != ".npz" or not target.absolute().parent.is_dir():
        raise BenchError(f"--save-reference {target}: must be a file name ending in .npz, in a folder that exists")
    files = metrics.reference_files(folder, options.reference_per_class)
    weights = Path(options.inception_weights) if options.inception_weights else None
    device = pick_device(options.device)
    network = metrics.load_features(options.features, device, weights)
    statistics = metrics.statistics_of(network.of_files(files, lambda x: tqdm(x, desc="features", unit="batch")))
    try:
        metrics.save_statistics(target, statistics, network)
    except OSError as error:
        raise BenchError(f"{target} cannot be written ({error.strerror or error})") from error
    print(f"{target}: {len(files)} pictures, {network.size} features of {network.name}")
    return 0


# --- what the arguments mean ------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> None:
    if options.speed_only and options.quality_only:
        raise BenchError("--speed-only and --quality-only leave nothing to do: give one of them")
    if options.random_weights and not options.speed_only:
        raise BenchError("--random-weights draws noise, which has no quality: add --speed-only")


def _check_numbers(options: argparse.Namespace) -> None:
    for name, value, low, high in (
        ("rounds", options.rounds, 1, 1000),
        ("resamples", options.resamples, 10, 100_000),
        ("processes", options.processes, 1, 256),
        ("reference-per-class", options.reference_per_class, 1, 10_000),
    ):
        if value is not None and not low <= value <= high:
            raise BenchError(f"--{name} {value}: must lie in {low} … {high}")


def _workloads(options: argparse.Namespace) -> list[Workload]:
    sizes = _integers("sizes", options.sizes, 64, 8192, 8) if options.sizes else [options.size]
    batches = _integers("batch-sizes", options.batch_sizes, 1, 1024) if options.batch_sizes else [options.batch_size]
    return [
        Workload(size, batch, options.steps, options.guidance, options.rounds, compiled)
        for compiled, batch, size in itertools.product((False, True)[: 1 + options.compile], batches, sizes)
    ]


def _integers(name: str, text: str, low: int, high: int, multiple: int = 1) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if not all(low <= value <= high and value % multiple == 0 for value in values):
        kind = "integers" if multiple == 1 else f"multiples of {multiple}"
        raise BenchError(f"--{name} {text!r}: must be {kind} in {low} … {high} with commas between")
    return list(dict.fromkeys(values))


def _load_reference(
    options: argparse.Namespace, plan: Plan, network: metrics.FeatureNetwork
) -> tuple[metrics.Statistics, str]:
    if options.reference is None:
        if options.model != "demo":
            raise BenchError(
                "--reference is missing: give a folder of pictures (ImageNet's validation set, one folder per class) "
                "or a .npz made by --save-reference; or --speed-only to time alone"
            )
        if network.name != "efficientnet-lite0":
            raise BenchError(
                "the demo model's own reference holds EfficientNet-Lite0 features: take --features efficientnet-lite0, "
                "or give the training pictures with --reference (eval/make_demo_reference.py --pictures writes them)"
            )
        every = metrics.load_named_features(DEMO_REFERENCE, network)
        chosen = metrics.statistics_of(every.of([name for _, name in plan.classes]))
        return chosen, "the demo model's training pictures of the same names"
    path = Path(options.reference)
    if path.suffix == ".npz":
        return metrics.load_statistics(path, network), str(path)
    files = metrics.reference_files(path, options.reference_per_class)
    features = network.of_files(files, lambda steps: tqdm(steps, desc="reference", unit="batch"))
    which = f", the first {options.reference_per_class} of each class" if options.reference_per_class else ""
    return metrics.statistics_of(features), f"{path}{which}"


# --- processes --------------------------------------------------------------------------------------------------------


class _Processes:
    """The processes that accelerate launch started; just this one without it.

    Attributes:
        rank, count: of this process, and of them.
        device: of this one; None where it is the only one and may choose.
    """

    def __init__(self, device: str | None):
        self.rank, self.count, self.device, self.state = 0, int(os.environ.get("WORLD_SIZE", "1")), None, None
        if self.count > 1:
            from accelerate import PartialState

            self.state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=_LONGEST_WAIT)
            self.rank, self.count = self.state.process_index, self.state.num_processes
            self.device = str(self.state.device)

    def wait(self) -> None:
        """For all of them to get here."""
        if self.state is not None:
            self.state.wait_for_everyone()
