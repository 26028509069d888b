"""One run of the benchmark from its arguments to the report: check, generate, time, score, report."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from agentsd.images.model_files import ModelError, check_model
from agentsd.images.names import SCHEDULERS
from eval.common.environment import environment
from eval.common.fair_schedules import check_fair
from eval.common.methods import METHODS, check_packages, load_module
from eval.common.models import ModelSpec, load_model, native_size, pick_device
from eval.common.processes import Processes, lock_folder
from eval.common.progress import progress
from eval.common.protocol import (
    DEMO_REFERENCE,
    PROMPT,
    SD,
    BenchError,
    Plan,
    choose_classes,
    demo_classes,
    imagenet_classes,
    make_scenarios,
    parse_methods,
    parse_numbers,
    rivals_of,
)

from . import report, scores
from .features import FeatureNetwork, check_features, load_features
from .generation import (
    BYTES_PER_PIXEL,
    Job,
    check_space,
    generate_all,
    generate_share,
    missing_images,
    open_folders,
)
from .images import FEWEST_IMAGES, reference_files, said_of_transparent
from .latency import Timing, Workload, measure
from .similarity import similarity_of_pairs

_DRY_STEPS = 4


def run(options: argparse.Namespace, command: str) -> int:
    """Do what the arguments of fid_bench.py say; returns the exit code. Raises BenchError for wrong input."""
    if options.report_only:
        folder = Path(options.report_only)
        report.write_report(folder)
        print((folder / "results.md").read_text(encoding="utf-8"))
        return 0
    _check_numbers(options)
    if options.score:
        print(score_two(options))
        return 0
    if options.save_reference:
        return _save_reference(options)
    modules = tuple(Path(path) for path in options.method_module)
    names = [name for path in modules for name in load_module(path)]
    if not set(names) & {name.strip() for name in options.methods.split(",")}:
        options.methods = ",".join([options.methods, *names])
    bench = _Bench(options, command, modules)
    return bench.dry_run() if options.dry_run else bench.run()


class _Bench:
    """The steps of a run; wrong input is found before anything is downloaded or generated."""

    def __init__(self, options: argparse.Namespace, command: str, modules: tuple[Path, ...]):
        self.options = options
        self.command = command
        self.processes = Processes(options.device)
        random = options.random_weights
        device = self.processes.device or options.device
        methods = parse_methods(options.methods)
        self.spec = ModelSpec(
            options.model, random, options.scheduler, device, options.dtype, options.revision,
            fair="fewer-steps" in methods,
        )  # fmt: skip
        ablate = [name for name in options.ablate.split(",") if name]
        intervals = parse_numbers("cache-intervals", options.cache_intervals, 2, 20) if options.cache_intervals else ()
        ratios = parse_numbers("ratios", options.ratios, 0.0, 0.75)
        self.timed = make_scenarios(methods, ratios, options.early, ablate, intervals)
        scored = tuple(scenario for scenario in self.timed if METHODS[scenario.method].scored)
        names = demo_classes() if options.model == "demo" and not random else imagenet_classes()
        report.check_settings(self.timed)
        plan = Plan(
            choose_classes(names, min(options.classes, len(names)) if random else options.classes),
            options.images_per_class, options.steps, options.guidance, options.scheduler, options.size,
            options.batch_size, options.threads, options.seed,
        )  # fmt: skip
        if not options.speed_only and len(plan.samples) < FEWEST_IMAGES:
            raise BenchError(
                f"{len(plan.samples)} images are too few for any score, which needs {FEWEST_IMAGES} at the very least: "
                "raise --classes or --images-per-class"
            )
        self.folder = Path(options.out or f"out/fid_bench-{options.preset}" + ("-speed" if options.speed_only else ""))
        self.job = Job(self.spec, plan, scored, self.folder / "images", modules)
        self.workloads = _workloads(options)

    def checks(self) -> list[Callable[[], Any]]:
        """Functions that raise BenchError if an input is missing, without downloading anything, cheapest first."""
        checks = [
            lambda: _check_flags(self.options),
            lambda: check_packages(scenario.method for scenario in self.timed),
            self._check_model,
        ]
        if not self.options.speed_only:
            checks += [lambda: _check_clip(self.options), lambda: _check_reference(self.options)]
        return checks

    def run(self) -> int:
        options, plan, first = self.options, self.job.plan, self.processes.rank == 0
        for check in self.checks():
            check()
        with lock_folder(self.folder) if first else contextlib.nullcontext():
            scorer = _Scorer(options, plan, self.spec) if first and not options.speed_only else None
            pipe = load_model(self.spec)
            side = plan.size or native_size(pipe)
            if first:
                paths = itertools.chain.from_iterable(map(self.job.paths, self.job.scenarios))
                images = 0 if options.speed_only else sum(not path.exists() for path in paths)
                check_space(self.folder, images, side**2)
                if not options.speed_only:
                    open_folders(pipe, self.job)
            results: dict[str, Any] = {"run": self._describe(pipe, side), "scored": {}, "rows": []}
            if first:
                report.write_report(self.folder, results, charts=False)  # the figures of an earlier run are gone
            if not options.speed_only:
                self._generate(pipe)
            if not first:
                return 0
            timings = [] if options.quality_only else self._time(pipe, results)
            if scorer is not None:
                del pipe
                results["scored"], rows = scorer.score(self.job)
                results["rows"] = report.make_rows(results["run"], self.timed, timings, rows)
            results = report.write_report(self.folder, results)
        found = report.tables(results["rows"], results["scored"].get("label", ""))
        print("\n\n".join([*found.values(), *results["verdict"]]))
        print(f"report: {self.folder / 'results.md'}")
        if options.speed_only and not any(row["seconds_per_image"] for row in results["rows"]):
            print("fid_bench: nothing could be timed; the table's notes say why", file=sys.stderr)
            return 1
        return 0

    def dry_run(self) -> int:
        """Print what a run would do, need and take; change nothing. Returns 2 where an input is missing."""
        options, plan = self.options, self.job.plan
        missing = []
        for check in self.checks():
            try:
                check()
            except BenchError as error:
                missing.append(str(error))
        scored = () if options.speed_only else self.job.scenarios
        print(f"scenarios: {len(self.timed)}, of which {len(scored)} are scored")
        for scenario in self.timed:
            print(f"  {scenario.name}" + ("" if scenario in scored else " (timed only)"))
        local = options.model == "demo" or options.random_weights or Path(options.model).exists()
        try:
            pipe = load_model(self.spec, **({} if local else {"local_files_only": True}))
        except BenchError as error:
            pipe = None
            missing.append(f"the model is not on this machine, a run would fetch it ({str(error)[:100]} …)")
        side = plan.size or (native_size(pipe) if pipe else 512)
        todo = missing_images(replace(self.job, scenarios=tuple(scored)))
        print(f"images: {len(scored)} × {len(plan.samples)} at {side} px, {todo} of them to be generated")
        exists = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        free = shutil.disk_usage(exists).free
        print(f"disk: {todo * side**2 * BYTES_PER_PIXEL / 1e9:.2f} GB in {self.folder}, {free / 1e9:.2f} GB free")
        print("missing: " + ("; ".join(missing) or "nothing"))
        if pipe is not None:
            print(f"time: {self._estimate(pipe, todo)}")
        return 2 if missing else 0

    def _estimate(self, pipe: Any, images: int) -> str:
        seconds: dict[tuple, float] = {}  # of one pipeline call, by size and batch
        plan = self.job.plan
        for size, batch in {(plan.size, plan.batch_size), *((w.size, w.batch_size) for w in self.workloads)}:
            [timing] = measure(pipe, [SD], Workload(size, batch, _DRY_STEPS, self.options.guidance, rounds=1))
            if timing.failed:
                return f"unknown: {timing.failed}"
            call = statistics.fmean(itertools.chain.from_iterable(timing.unet_seconds.values()))
            seconds[size, batch] = timing.seconds[0] + call * (self.options.steps - _DRY_STEPS)
        each = seconds[plan.size, plan.batch_size] / plan.batch_size
        rounds = sum(len(self.timed) * w.rounds * seconds[w.size, w.batch_size] for w in self.workloads)
        return (
            f"{_hours(each * images)} to generate in one process ({each:.1f} s per image, from {_DRY_STEPS} steps of "
            f"sd), {_hours(0 if self.options.quality_only else rounds)} to time; less where a method is faster than "
            "sd; scores not included"
        )

    def _check_model(self) -> None:
        if not self.options.random_weights:
            try:
                check_model(self.options.model)
            except ModelError as error:
                raise BenchError(f"--model {self.options.model}: {error}") from None
        if self.spec.scheduler not in SCHEDULERS:
            raise BenchError(f"scheduler={self.spec.scheduler!r}: must be one of {', '.join(SCHEDULERS)}")
        if self.spec.fair:
            check_fair(self.spec.scheduler)
        pick_device(self.spec.device, self.spec.dtype)

    def _describe(self, pipe: Any, side: int) -> dict[str, Any]:
        options, plan = self.options, self.job.plan
        protocol = f"{plan.steps} {plan.scheduler} steps, guidance {plan.guidance:g}, seed {plan.seed}."
        if not options.speed_only:
            what = f"{len(plan.classes)} classes × {plan.copies}, prompt “{PROMPT}”"
            protocol = f"{what}, {side} px, batch {plan.batch_size}, {protocol}"
        if not options.quality_only:
            sizes = dict.fromkeys(str(workload.size or side) for workload in self.workloads)
            batches = dict.fromkeys(str(workload.batch_size) for workload in self.workloads)
            protocol += f" Timed at {', '.join(sizes)} px, batch {', '.join(batches)}."
        dtype, device = str(pipe.unet.dtype).removeprefix("torch."), pipe.unet.device.type
        settings = (
            self.spec.name, plan.scheduler, plan.steps, plan.guidance, plan.seed,
            plan.threads if device == "cpu" else None, None if options.quality_only else options.rounds, dtype, device,
            self.spec.fair,
        )  # fmt: skip
        return {
            "title": f"fid_bench: {self.spec.name}" + (", speed only" if options.speed_only else ""),
            "command": self.command,
            "protocol": protocol,
            "model": self.spec.name,
            "size": side,
            "batch_size": plan.batch_size,
            "settings": dict(zip(report.RUN_SETTINGS, settings)),
            "colours": {scenario.method: METHODS[scenario.method].colour for scenario in self.timed},
            "scenarios": [scenario.name for scenario in self.timed],
            "files": [sample.file for sample in plan.samples][: len(plan.classes)],
            "environment": environment(pipe.unet.device, pipe.unet.dtype),
        }

    def _generate(self, pipe: Any) -> None:
        workers = self.processes
        workers.wait()
        if workers.count > 1:
            generate_share(pipe, self.job, workers.rank, workers.count)
        else:
            generate_all(pipe, self.job, self.options.processes)
        workers.wait()

    def _time(self, pipe: Any, results: dict[str, Any]) -> list[Timing]:
        timings: list[Timing] = []
        total = len(self.timed) * sum(workload.rounds + 1 for workload in self.workloads)
        with progress(total=total, desc="timing", unit="call") as bar:
            for workload in self.workloads:

                def show(name: str, number: int, size: int | None = workload.size) -> None:
                    bar.set_postfix_str(f"{name}, {size or ''} " + (f"round {number}" if number else "warm-up"))
                    bar.update()

                timings += measure(pipe, self.timed, workload, show)
                results["rows"] = report.make_rows(results["run"], self.timed, timings, {})
                report.write_report(self.folder, results, charts=False)
        return timings


class _Scorer:
    """The feature network and the reference, loaded before an image is generated; then the scores."""

    def __init__(self, options: argparse.Namespace, plan: Plan, spec: ModelSpec):
        device = pick_device(spec.device)
        self.plan = plan
        self.resamples = options.resamples
        self.clip = scores.ClipScore(Path(options.clip), device) if options.clip else None
        self.network = load_features(options.features, device, _inception_weights(options))
        self.reference, self.named = _load_reference(options, plan, self.network)

    def score(self, job: Job) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """What the scores are of, and each scenario's scores by name."""
        features = {}
        for scenario in progress(job.scenarios, desc="features", unit="scenario"):
            features[scenario.name] = self.network.of_files(job.paths(scenario))
        files = {scenario.name: job.paths(scenario) for scenario in job.scenarios}
        rows = scores.score_sets(
            features, files, self.network, self.reference, self.resamples, progress,
            groups=[sample.index for sample in self.plan.samples], rivals=rivals_of(job.scenarios),
        )  # fmt: skip
        if self.clip is not None:
            prompts = [sample.prompt for sample in self.plan.samples]
            for name, row in rows.items():
                row["clip_score"] = self.clip.of(files[name], prompts)
        scored = {
            "features": self.network.name,
            "label": self.network.label,
            "feature_size": self.network.size,
            "reference": self.named,
            "reference_count": self.reference.count,
            "resamples": self.resamples,
            "resampled": "names" if self.plan.copies > 1 and len(self.plan.classes) > 1 else "images",
        }
        return scored, rows


def score_two(options: argparse.Namespace) -> str:
    """The row of --score A B: the distance of A to B, and their pairwise similarity where the file names are equal."""
    check_features(options.features, _inception_weights(options))
    device = pick_device(options.device)
    paths = [Path(path) for path in options.score]
    files = [None if path.suffix == ".npz" else reference_files(path, options.reference_per_class) for path in paths]
    for path, own in zip(paths, files):
        _tell_of_transparent(path, own or [])
    network = load_features(options.features, device, _inception_weights(options))
    a, b = (
        scores.load_statistics(path, network) if own is None else scores.statistics_of(network.of_files(own, progress))
        for path, own in zip(paths, files)
    )
    row: dict[str, Any] = {"scenario": f"{paths[0]} to {paths[1]}", "images": a.count or None}
    row["fid" if network.name == "inception" else "fd"] = scores.frechet_distance(a, b)
    if a.features is not None and b.features is not None:
        row["kid"], row["kid_deviation"] = scores.kernel_distance(a.features, b.features)
    if files[0] and files[1] and [path.name for path in files[0]] == [path.name for path in files[1]]:
        with contextlib.suppress(ValueError):  # images of different sizes have no PSNR
            row["psnr"], row["ssim"] = map(float, np.median(similarity_of_pairs(files[0], files[1]), axis=0))
    return report.tables([row], network.label)["quality"].replace(" to sd", " of pairs")


def _save_reference(options: argparse.Namespace) -> int:
    folder, target = map(Path, options.save_reference)
    if target.suffix != ".npz" or not target.absolute().parent.is_dir():
        raise BenchError(f"--save-reference {target}: must be a file name ending in .npz, in a folder that exists")
    if target.exists() and not options.overwrite:
        raise BenchError(f"--save-reference {target}: is there already: give another name, or --overwrite")
    check_features(options.features, _inception_weights(options))
    device = pick_device(options.device)
    files = reference_files(folder, options.reference_per_class)
    _tell_of_transparent(folder, files)
    network = load_features(options.features, device, _inception_weights(options))
    statistics = scores.statistics_of(network.of_files(files, lambda x: progress(x, desc="features", unit="batch")))
    try:
        scores.save_statistics(target, statistics, network)
    except OSError as error:
        raise BenchError(f"{target} cannot be written ({error.strerror or error})") from error
    print(f"{target}: {len(files)} images, {network.size} features of {network.name}")
    return 0


# --- what the arguments mean ------------------------------------------------------------------------------------------


def _check_flags(options: argparse.Namespace) -> None:
    if options.speed_only and options.quality_only:
        raise BenchError("--speed-only and --quality-only leave nothing to do: give one of them")
    if options.random_weights and not options.speed_only:
        raise BenchError("--random-weights generates noise, which has no quality: add --speed-only")


def _check_numbers(options: argparse.Namespace) -> None:
    for name, value, low, high in (
        ("rounds", options.rounds, 1, 1000),
        ("resamples", options.resamples, 10, 100_000),
        ("processes", options.processes, 1, 256),
        ("reference-per-class", options.reference_per_class, 1, 10_000),
    ):
        if value is not None and not low <= value <= high:
            raise BenchError(f"--{name} {value}: must lie in {low} … {high}")


def _check_clip(options: argparse.Namespace) -> None:
    if options.clip and not (Path(options.clip) / "config.json").is_file():
        raise BenchError(
            f"--clip {options.clip}: is no CLIP model (there is no config.json in it): give a folder that CLIPModel "
            "and CLIPProcessor were saved to"
        )


def _check_reference(options: argparse.Namespace) -> None:
    """Everything about the reference that can be known without the feature network."""
    check_features(options.features, _inception_weights(options))
    if options.reference is None:
        if options.model != "demo":
            raise BenchError(
                "--reference is missing: give a folder of images (ImageNet's validation set, one folder per class) "
                "or a .npz made by --save-reference; or --speed-only to time alone"
            )
        if options.features != "efficientnet-lite0":
            raise BenchError(
                "the demo model's own reference holds EfficientNet-Lite0 features: take --features efficientnet-lite0, "
                "or give the training images with --reference (eval/gate_reference.py writes them)"
            )
    elif Path(options.reference).suffix != ".npz":
        reference_files(Path(options.reference), options.reference_per_class)
    elif not Path(options.reference).is_file():
        raise BenchError(f"--reference {options.reference}: is no .npz file, as there is no such file")


def _inception_weights(options: argparse.Namespace) -> Path | None:
    return Path(options.inception_weights) if options.inception_weights else None


def _workloads(options: argparse.Namespace) -> list[Workload]:
    sizes = parse_numbers("sizes", options.sizes, 64, 8192, 8) if options.sizes else [options.size]
    batches = (
        parse_numbers("batch-sizes", options.batch_sizes, 1, 1024) if options.batch_sizes else [options.batch_size]
    )
    return [
        Workload(size, batch, options.steps, options.guidance, options.rounds, compiled)
        for compiled, batch, size in itertools.product((False, True)[: 1 + options.compile], batches, sizes)
    ]


def _load_reference(options: argparse.Namespace, plan: Plan, network: FeatureNetwork) -> tuple[scores.Statistics, str]:
    if options.reference is None:
        every = scores.load_named_features(DEMO_REFERENCE, network)
        chosen = scores.statistics_of(every.of([name for _, name in plan.classes]))
        return chosen, "the demo model's training images of the same names"
    path = Path(options.reference)
    if path.suffix == ".npz":
        return scores.load_statistics(path, network), str(path)
    files = reference_files(path, options.reference_per_class)
    said = _tell_of_transparent(path, files)
    features = network.of_files(files, lambda steps: progress(steps, desc="reference", unit="batch"))
    which = f", the first {options.reference_per_class} of each class" if options.reference_per_class else ""
    return scores.statistics_of(features), f"{path}{which}" + (f" ({said})" if said else "")


def _tell_of_transparent(folder: Path, files: Sequence[Path]) -> str:
    said = said_of_transparent(files)
    if said:
        print(f"fid_bench: {folder}: {said}", file=sys.stderr)
    return said


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
