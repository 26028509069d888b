"""The gate: what a model must show before attention methods are compared on it, from the arguments to the report."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agentsd.files import write_atomically
from eval.common.environment import environment, environment_line
from eval.common.models import ModelSpec, load_model, native_size, pick_device
from eval.common.processes import lock_folder
from eval.common.progress import progress
from eval.common.protocol import (
    CONTROLS,
    DEMO_REFERENCE,
    PROMPT,
    BenchError,
    Plan,
    Sample,
    choose_classes,
    demo_classes,
    make_scenarios,
)
from eval.common.tables import Column, table, write_json
from eval.fid import report, scores
from eval.fid.features import FeatureNetwork, load_features
from eval.fid.generation import Job, check_space, generate_all, missing_images, open_folders
from eval.fid.images import FEWEST_IMAGES

from .effective_keys import QUERY_STRIDE, KeySpread, measure_effective_keys

MOST_KEYS = 1 / 4
LEAST_RECOGNISED = 0.8
PSNR_STEP = 3.0  # dB: twice the squared error

_FEATURES = "efficientnet-lite0"
_CONFUSIONS = 8

_SCORE_COLUMNS = (
    Column("scenario", "scenario", "{}"),
    Column("recognised", "recognised", "{}"),
    Column("images", "of", "{}"),
    Column("recognition", "share [95 %]", "{:.0%}", interval=True),
    *(column for column in report.COLUMNS if column.key.startswith(("fd", "kid", "psnr", "ssim")) and column.heading),
)
_KEY_COLUMNS = (
    Column("layer", "layer", "{}"),
    Column("queries", "queries", "{:,}"),
    Column("tokens", "keys, N", "{:,}"),
    Column("median", "effective keys, median", "{:.1f}"),
    Column("quartiles", "quartiles"),
    Column("share", "median / N", "{:.3f}"),
    Column("share_quartiles", "quartiles / N"),
)
_BAR_COLUMNS = tuple(Column(key, key) for key in ("bar", "rule", "figure", "met"))


@dataclass(frozen=True)
class Bar:
    """One thing asked of the model.

    Attributes:
        bar: what is asked about.
        rule: when it is met.
        figure: what was measured.
        met: whether it is.
    """

    bar: str
    rule: str
    figure: str
    met: bool


def run(options: argparse.Namespace, command: str) -> int:
    """Do what the arguments of demo_gate.py say; returns the exit code. Raises BenchError for wrong input.

    Wrong input is found before the first image is generated.
    """
    for name, value, high in (("processes", options.processes, 256), ("prompts", options.prompts, 1000)):
        if value is not None and not 1 <= value <= high:
            raise BenchError(f"--{name} {value}: must lie in 1 … {high}")
    scenarios = make_scenarios(("sd", "tomesd", "agentsd", *CONTROLS), (_ratio(options.ratio),), options.early)
    spec = ModelSpec(options.model, None, options.scheduler, options.device, options.dtype)
    path = _reference_path(options)
    network = load_features(_FEATURES, pick_device(spec.device))
    reference = scores.load_named_features(path, network)
    plan, trained = _make_plan(options, reference)
    folder = Path(options.out)
    job = Job(spec, plan, tuple(scenarios), folder / "images")
    with lock_folder(folder):
        pipe = load_model(spec)
        side = plan.size or native_size(pipe)
        check_space(folder, missing_images(job), side**2)
        open_folders(pipe, job)
        config = next(scenario.settings for scenario in scenarios if scenario.method == "agentsd")
        prompts = progress(_spread_over(plan, options.prompts), desc="effective keys", unit="image")
        spreads = measure_effective_keys(pipe, plan, prompts, config)
        generate_all(pipe, job, options.processes)
        rows = _score(job, network, reference, trained)
        bars = judge(spreads[0], {row["method"]: row for row in rows})
        found: dict[str, Any] = {
            "title": f"demo_gate: {spec.name}",
            "command": command,
            "environment": environment(pipe.unet.device, pipe.unet.dtype),
            "protocol": f"{len(plan.classes)} names × {plan.copies}, prompt “{PROMPT}”, {plan.steps} {plan.scheduler} "
            f"steps, guidance {plan.guidance:g}, {side} px, batch {plan.batch_size}, seed {plan.seed}. The "
            f"agent phase is the noisiest {options.early:.0%} of the diffusion run. Effective keys in {prompts.total} "
            f"of these images, both halves of guidance, every {QUERY_STRIDE}th query token.",
            "label": network.label,
            "reference": f"{len(reference.names)} training images of {len(set(reference.names))} names in "
            + (path.name if path == DEMO_REFERENCE else str(path)),
            "passes": all(bar.met for bar in bars),
            "verdict": verdict(bars),
            "bars": [asdict(bar) for bar in bars],
            "effective_keys": [asdict(spread) for spread in spreads],
            "rows": rows,
        }
        write_json(folder / "gate.json", found)
        write_atomically(folder / "gate.md", as_markdown(found))
    print("\n".join([found["verdict"], "", *_lines(bars), "", *_confusion_lines(rows[:1], 5)]))
    print(f"report: {folder / 'gate.md'}")
    return 1 if options.strict and not found["passes"] else 0


def judge(keys: KeySpread, rows: Mapping[str, Mapping[str, Any]]) -> list[Bar]:
    """Hold the figures against the bars.

    Args:
        keys: of all layers together.
        rows: method to its row, with psnr, fd_difference, recognition and their intervals.
    """
    sd, merged = rows["sd"], rows["tomesd"]
    bars = [
        Bar(
            "effective keys of full-resolution self-attention, agent phase",
            f"median at most N/4 = {keys.tokens * MOST_KEYS:,g}",
            f"{keys.median:,.0f} of {keys.tokens:,} ({keys.share:.0%}; quartiles {keys.low:,.0f} … {keys.high:,.0f})",
            keys.share <= MOST_KEYS,
        ),
        Bar("sd: recognised", f"at least {LEAST_RECOGNISED:.0%}", _share(sd), sd["recognition"] >= LEAST_RECOGNISED),
    ]
    for method in CONTROLS:
        row = rows[method]
        low, high = row["fd_difference_ci"]
        bars += [
            Bar(
                f"{method}: PSNR to sd",
                f"at least {PSNR_STEP:g} dB below ToMeSD's {merged['psnr']:.1f}",
                f"{row['psnr']:.1f} dB",
                row["psnr"] <= merged["psnr"] - PSNR_STEP,
            ),
            Bar(
                f"{method}: FD − sd",
                "95 % interval above 0",
                f"{row['fd_difference']:+.1f} [{low:+.1f}, {high:+.1f}]",
                low > 0,
            ),
            Bar(
                f"{method}: recognised",
                f"95 % interval below sd's, which begins at {sd['recognition_ci'][0]:.0%}",
                _share(row),
                row["recognition_ci"][1] < sd["recognition_ci"][0],
            ),
        ]
    return bars


def verdict(bars: Sequence[Bar]) -> str:
    """One sentence: whether the model passes, and if not, what it fails."""
    failed = [bar.bar for bar in bars if not bar.met]
    if not failed:
        return f"PASSES the gate: all {len(bars)} bars are met, so this model can tell attention methods apart."
    verb = "is" if len(failed) == 1 else "are"
    return f"FAILS the gate: {len(failed)} of {len(bars)} bars {verb} not met ({'; '.join(failed)})."


def recognition(images: Sequence[Sample], taken_for: Sequence[str]) -> dict[str, Any]:
    """How many images are nearest to the name they were prompted with, as columns of a row.

    Args:
        images: as generated.
        taken_for: of each the name that nearest_names gives; a tie between names is none of them.
    """
    pairs = [(image.name, taken) for image, taken in zip(images, taken_for)]
    wrong = Counter((name, taken) for name, taken in pairs if name != taken)
    hits = len(pairs) - wrong.total()
    return {
        "recognised": hits,
        **wilson_interval(hits, len(pairs)).as_row("recognition"),
        "confusions": [[name, taken, count] for (name, taken), count in wrong.most_common()],
    }


def as_markdown(found: Mapping[str, Any]) -> str:
    """The whole report as text, from what gate.json holds."""
    keys = [
        {
            **spread,
            "quartiles": f"{spread['low']:.1f} … {spread['high']:.1f}",
            "share": spread["median"] / spread["tokens"],
            "share_quartiles": f"{spread['low'] / spread['tokens']:.3f} … {spread['high'] / spread['tokens']:.3f}",
        }
        for spread in found["effective_keys"]
    ]
    parts = [
        f"# {found['title']}",
        f"`{found['command']}`",
        environment_line(found["environment"]),
        found["protocol"],
        f"**{found['verdict']}**",
        table(
            [{**bar, "met": "yes" if bar["met"] else "**no**"} for bar in found["bars"]],
            _BAR_COLUMNS,
        ),
        "## Effective keys",
        "exp of the entropy (natural logarithm) of a query's attention weights: N where all keys weigh the same, 1 "
        "where one key has all the weight. Unpatched model, all steps of the agent phase, all heads.",
        table(keys, _KEY_COLUMNS),
        "## Controls and recognition",
        "mean-value and no-attention are agentsd, but in the agent phase the full-resolution self-attention returns "
        "its mean value token, or zero. An image is recognised if, among the reference's images, the "
        f"nearest is one of the prompted name: by the cosine of {_FEATURES} features less their mean over the names; "
        "ties with another name do not count. Intervals of shares are Wilson's; FD is the distance to the training "
        "images of the same names, its differences are paired bootstrap intervals, as in fid_bench. "
        f"Reference: {found['reference']}.",
        table(found["rows"], _SCORE_COLUMNS, found["label"]),
        "Prompted → taken for: ",
        "\n".join(f"- {line}" for line in _confusion_lines(found["rows"], _CONFUSIONS)),
    ]  # fmt: skip
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


# --- features -> names ------------------------------------------------------------------------------------------------


def nearest_names(features: np.ndarray, reference: scores.NamedFeatures) -> list[str]:
    """For each image the name of the reference image most similar to it.

    Similarity is the cosine of the features less their mean over the reference, in which every name counts once: what
    all images have in common says nothing about the name.

    Args:
        features: [N, D].

    Returns:
        N names; "a or b" where images of several names are equally near, as for one that is similar to none.
    """
    names = list(dict.fromkeys(reference.names))
    owner = np.array([names.index(name) for name in reference.names])
    centre = np.mean([reference.features[owner == i].mean(0) for i in range(len(names))], axis=0)

    def directions(rows: np.ndarray) -> np.ndarray:
        rows = rows - centre
        return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)

    cosines = directions(features) @ directions(reference.features).T
    by_name = np.stack([cosines[:, owner == i].max(axis=1) for i in range(len(names))], axis=1)
    nearest = by_name >= by_name.max(axis=1, keepdims=True) - 1e-9  # equal rows may differ in the last bits
    return [" or ".join(name for name, near in zip(names, row) if near) for row in nearest]


def wilson_interval(successes: int, trials: int) -> scores.Interval:
    """A share with its 95 % score interval (Wilson, J. Am. Stat. Assoc. 22, 1927), valid also at 0 and 1."""
    z, share = 1.959963984540054, successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return scores.Interval(share, max(0.0, centre - half), min(1.0, centre + half))


# --- steps of a run ---------------------------------------------------------------------------------------------------


def _score(
    job: Job, network: FeatureNetwork, reference: scores.NamedFeatures, trained: scores.Statistics
) -> list[dict[str, Any]]:
    files = {scenario.name: job.paths(scenario) for scenario in job.scenarios}
    features = {
        name: network.of_files(paths) for name, paths in progress(files.items(), desc="features", unit="scenario")
    }
    groups = [sample.index for sample in job.plan.samples]
    found = scores.score_sets(features, files, network, trained, progress=progress, groups=groups)
    return [
        {
            "scenario": scenario.name,
            "method": scenario.method,
            **found[scenario.name],
            **recognition(job.plan.samples, nearest_names(features[scenario.name], reference)),
        }
        for scenario in job.scenarios
    ]


def _reference_path(options: argparse.Namespace) -> Path:
    if options.reference:
        return Path(options.reference)
    if options.model == "demo":
        return DEMO_REFERENCE
    raise BenchError(
        "--reference is missing: give a .npz with names and features of the model's training images, as "
        "eval/gate_reference.py writes"
    )


def _make_plan(options: argparse.Namespace, reference: scores.NamedFeatures) -> tuple[Plan, scores.Statistics]:
    """What to generate, and the training images of the same names; raises BenchError where either are too few."""
    plan = Plan(
        _choose_names(options, reference), options.images_per_class, options.steps, options.guidance,
        options.scheduler, options.size, options.batch_size, options.threads, options.seed,
    )  # fmt: skip
    trained = scores.statistics_of(reference.of(name for _, name in plan.classes))
    for count, what in ((len(plan.samples), "images"), (trained.count, "training images of their names")):
        if count < FEWEST_IMAGES:
            raise BenchError(
                f"{count} {what} are too few for any Fréchet distance, which needs {FEWEST_IMAGES} at the "
                "very least: raise --classes or --images-per-class"
            )
    return plan, trained


def _choose_names(options: argparse.Namespace, reference: scores.NamedFeatures) -> tuple[tuple[int, str], ...]:
    """(place among the reference's names, name) of what to generate; raises BenchError for a name it does not have."""
    known = list(dict.fromkeys(reference.names))
    if options.names is not None:
        names = [name.strip() for name in options.names.split(",")]
    else:
        # The built-in model's names are fixed; those of any other are the reference's.
        every = demo_classes() if options.model == "demo" else known
        names = [name for _, name in choose_classes(every, options.classes)]
    if len(set(names)) != len(names):
        raise BenchError(f"--names {options.names!r}: a name stands there twice")
    reference.of(names)
    return tuple((known.index(name), name) for name in names)


def _ratio(ratio: float) -> float:
    if not 0 < ratio <= 0.75:
        raise BenchError(f"--ratio {ratio:g}: must lie above 0 and be at most 0.75")
    return ratio


def _spread_over(plan: Plan, count: int) -> list[Sample]:
    """Some of the plan's first images of each name, spread evenly."""
    first = plan.samples[: len(plan.classes)]
    return [first[k] for k in sorted({k * len(first) // count for k in range(count)})]


# --- words ------------------------------------------------------------------------------------------------------------


def _share(row: Mapping[str, Any]) -> str:
    low, high = row["recognition_ci"]
    return f"{row['recognised']}/{row['images']} = {row['recognition']:.0%} [{low:.0%}, {high:.0%}]"


def _lines(bars: Sequence[Bar]) -> list[str]:
    return [f"{'met    ' if bar.met else 'NOT MET'}  {bar.bar}: {bar.figure}; {bar.rule}" for bar in bars]


def _confusion_lines(rows: Sequence[Mapping[str, Any]], most: int) -> list[str]:
    lines = []
    for row in rows:
        told = [f"{name} → {taken}" + (f" ({count}×)" if count > 1 else "") for name, taken, count in row["confusions"]]
        more = f" and {len(told) - most} more" if len(told) > most else ""
        lines.append(f"{row['scenario']}: {'; '.join(told[:most]) or 'none'}{more}")
    return lines
