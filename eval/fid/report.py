"""Turn what a run measured into rows, two tables and sentences, from results.json alone; computes no score itself.

A folder of results holds results.json (what was asked for and every measured figure) and what this file makes of it:
results.csv (all columns), results.md (two short tables) and charts.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agentsd import Phase
from agentsd.files import write_atomically
from agentsd.images.rounds import FEWEST, STABLE, speed_up
from eval.common.environment import environment_line
from eval.common.methods import METHODS
from eval.common.protocol import CONTROLS, WITH_INTERVAL, BenchError, Scenario
from eval.common.tables import Column, as_csv, figure, table, write_json

from .latency import Timing
from .plots import grid_image, quality_chart, speed_chart

RESULTS = "results.json"


COLUMNS = (
    Column("scenario", "scenario", tables="quality speed"),
    Column("size", "px", tables="speed"),
    Column("batch_size", "batch", tables="speed"),
    Column("compiled"),
    Column("images", "images", tables="quality"),
    Column("fid_difference", "FID − sd [95 %]", "{:+.2f}", "quality", interval=True),
    Column("fid_difference_tomesd", "FID − tomesd [95 %]", "{:+.2f}", "quality", interval=True),
    Column("fid_difference_deepcache", "FID − deepcache [95 %]", "{:+.2f}", "quality", interval=True),
    Column("fid", "FID", "{:.2f}", "quality"),
    Column("fd_difference", "FD − sd [95 %]", "{:+.2f}", "quality", interval=True),
    Column("fd_difference_tomesd", "FD − tomesd [95 %]", "{:+.2f}", "quality", interval=True),
    Column("fd_difference_deepcache", "FD − deepcache [95 %]", "{:+.2f}", "quality", interval=True),
    Column("fd", "{label}", "{:.2f}", "quality"),
    Column("kid", "KID", "{:.5f}", "quality"),
    Column("kid_deviation"),
    Column("psnr", "PSNR to sd, dB", "{:.1f}", "quality"),
    Column("psnr_difference_tomesd", interval=True),
    Column("psnr_difference_deepcache", interval=True),
    Column("nearer_than_tomesd"),
    Column("nearer_than_deepcache"),
    Column("ssim", "SSIM to sd", "{:.4f}", "quality"),
    Column("clip_score", "CLIP score", "{:.2f}", "quality"),
    Column("seconds"),
    Column("seconds_per_image", "s / image", "{:.3f}", "speed"),
    Column("speedup_vs_sd", "× sd", "{:.2f}", "speed"),
    Column("unet_agent_ms", "UNet call, agent phase, ms", "{:.1f}", "speed"),
    Column("unet_agent_speedup"),
    Column("unet_merge_ms", "later phase, ms", "{:.1f}", "speed"),
    Column("unet_merge_speedup"),
    Column("calls", "UNet calls, whole + cached", tables="speed"),
    Column("unet_whole_ms"),
    Column("unet_cached_ms"),
    Column("peak_gb"),
    Column("peak_gb_per_image", "GB / image over the model", "{:.2f}", "speed"),
    Column("note", "note", tables="speed"),
)
"""Every measured figure, in the order of the tables and of results.csv. No table has more than ten columns."""


def write_report(folder: Path, results: dict[str, Any] | None = None, charts: bool = True) -> dict[str, Any]:
    """Write results.json, results.csv, results.md and the charts.

    Args:
        folder: folder of the results; the grid of images is made of its images/, where there is one.
        results: run (what was asked for), scored (what the scores are of; empty without scores) and rows; None reads
            the folder's results.json.
        charts: whether to make the charts too.

    Returns:
        The results, with verdict, the sentences on quality.

    Raises:
        BenchError: there is nothing to report on, or the folder cannot be written to.
    """
    results = dict(results or _read(folder / RESULTS))
    run, scored = results["run"], results.get("scored") or {}
    rows = [{**dict.fromkeys(_KEYS), **row} for row in results["rows"]]
    results |= {"scored": scored, "rows": rows, "verdict": verdict(rows, scored)}
    try:
        write_json(folder / RESULTS, results)
        write_atomically(folder / "results.csv", as_csv(rows, run["environment"]))
        if charts:
            footer = environment_line(run["environment"])
            colours = colours_of(rows, run)
            made = {
                "speedup.png": speed_chart(rows, folder / "speedup.png", footer, colours),
                "quality.png": quality_chart(rows, scored.get("label", ""), folder / "quality.png", footer, colours),
            }
            for name in (name for name, there in made.items() if not there):
                (folder / name).unlink(missing_ok=True)  # it shows the figures of an earlier run
            grid_image(run, folder / "images", folder / "grid.webp", f"{run['command']}: {footer}")
        write_atomically(folder / "results.md", as_markdown(results, [n for n in _CHARTS if (folder / n).is_file()]))
    except OSError as error:
        raise BenchError(f"{folder} cannot be written to ({error.strerror or error})") from error
    return results


def scenario_row(scenario: Scenario) -> dict[str, Any]:
    """A scenario as the first columns of its row: every setting that its method uses, under its own name."""
    row: dict[str, Any] = {}
    if scenario.method == "tomesd":
        row = {key: getattr(scenario.settings, key) for key in ("ratio", "use_rand", "seed")}
    elif scenario.config is not None:
        row = asdict(scenario.config)
    if scenario.method in WITH_INTERVAL:
        row["interval"] = scenario.interval
    row |= {**METHODS[scenario.method].fixed, **scenario.options}
    return {**row, "scenario": scenario.name, "method": scenario.method, "cache_interval": scenario.cache_interval}


def check_settings(scenarios: Sequence[Scenario]) -> None:
    """Raise BenchError where a method's own setting has the name of a column: one of the two would be lost."""
    for scenario in scenarios:
        if taken := scenario.options.keys() & {*_KEYS, *RUN_SETTINGS, "scenario", "method", "compiled", "environment"}:
            name = min(taken)
            if name != "cache_interval":
                raise BenchError(f"method {scenario.method}: results have a column {name!r}; rename its setting")


RUN_SETTINGS = ("model", "scheduler", "steps", "guidance", "run_seed", "threads", "rounds", "dtype", "device", "fair")
"""What all rows of a run share; each row has them beside its own. fair: see ModelSpec."""


def colours_of(rows: Sequence[dict[str, Any]], run: dict[str, Any]) -> dict[str, str]:
    """The colour of each row's method: what the run says, as a method may come from a file that is not loaded now."""
    kept = run.get("colours", {})
    known = {name: method.colour for name, method in METHODS.items()}
    return {row["method"]: kept.get(row["method"]) or known.get(row["method"], "#000000") for row in rows}


def make_rows(
    run: dict[str, Any], scenarios: Sequence[Scenario], timings: Sequence[Timing], scores: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row per scenario and workload: settings of the scenario and of the run, scores, times.

    Scores are in the row with the times of the same size and batch, not compiled, or in one of their own.
    """
    rows = []
    for scenario in scenarios:
        base = {**scenario_row(scenario), **run.get("settings", {})}
        score = scores.get(scenario.name, {})
        own = [timing for timing in timings if timing.scenario == scenario.name]
        for timing in own:
            same = (timing.workload.size, timing.workload.batch_size) == (run["size"], run["batch_size"])
            rows.append({**base, **(score if same and not timing.workload.compile else {}), **_times(timing, timings)})
            score = {} if same and not timing.workload.compile else score
        if score:
            rows.append({**base, "size": run["size"], "batch_size": run["batch_size"], **score})
    order = {scenario.name: i for i, scenario in enumerate(scenarios)}
    workload = lambda row: (row.get("compiled") or "", row["size"], row["batch_size"])  # noqa: E731
    return sorted(rows, key=lambda row: (workload(row), order[row["scenario"]]))


def verdict(rows: Sequence[dict[str, Any]], scored: dict[str, Any]) -> list[str]:
    """What the scores say of each method's effect on quality, in sentences; none without scores.

    AgentSD is compared with Stable Diffusion, as every method is, and with ToMeSD at the same ratio or DeepCache at the
    same interval: two methods may differ although their intervals against Stable Diffusion overlap.
    """
    key = "fid_difference" if scored.get("features") == "inception" else "fd_difference"
    label = scored.get("label", "")
    compared = [row for row in rows if row.get(key) is not None]
    if not compared:
        return []
    sentences = []
    for row in compared:
        if row["method"] in CONTROLS:
            continue
        sentences.append(_compared(row, key, label, "sd"))
        rivals = (
            ("tomesd", f"tomesd-r{row.get('ratio') or 0:g}"),
            ("deepcache", f"deepcache-{row.get('cache_interval')}"),
        )
        for method, other in rivals:
            if row.get(f"{key}_{method}") is not None:
                sentences.append(_compared(row, f"{key}_{method}", label, other))
            if row.get(f"psnr_difference_{method}") is not None:
                difference = figure(row[f"psnr_difference_{method}"], row[f"psnr_difference_{method}_ci"], "{:+.2f}")
                sentences.append(
                    f"{row['scenario']}: PSNR to sd {difference} dB over {other}'s on average, nearer to sd in "
                    f"{row[f'nearer_than_{method}']} of {row['images']} images."
                )
    least = min((row[key] for row in compared if row["method"] == "agentsd"), default=0.0)
    for row in compared:
        if row["method"] not in CONTROLS:
            continue
        text = f"Control {row['scenario']}: {figure(row[key], row[f'{key}_ci'], '{:+.2f}')}"
        if row[f"{key}_ci"][0] <= max(0.0, least):
            sentences.append(
                f"{text}. Removing this attention costs no more than replacing it: this model and this score cannot "
                "tell attention methods apart."
            )
        else:
            sentences.append(f"{text}: the cost of removing this attention, to compare the methods with.")
    images = compared[0]["images"]
    if images < scored.get("feature_size", 0):
        sentences.append(
            f"{images} images are fewer than the {scored['feature_size']} features: the distance itself is biased "
            "upward, and only differences at equal numbers of images mean something."
        )
    return sentences


def tables(rows: Sequence[dict[str, Any]], label: str = "") -> dict[str, str]:
    """Quality and speed as two tables, each with the rows that have such a figure, as Markdown by name."""
    found = {}
    for name, key in (("quality", "images"), ("speed", "seconds_per_image")):
        own = [row for row in rows if row.get(key) or (name == "speed" and row.get("note"))]
        shown = [row | {"scenario": f"{row['scenario']}, compiled"} if row.get("compiled") else row for row in own]
        if own:
            found[name] = table(shown, [column for column in COLUMNS if name in column.tables.split()], label)
    return found


def as_markdown(results: dict[str, Any], charts: Sequence[str] = ()) -> str:
    """The whole report as text."""
    run, scored, rows = results["run"], results["scored"], results["rows"]
    parts = [f"# {run['title']}", f"`{run['command']}`", environment_line(run["environment"]), run["protocol"]]
    found = tables(rows, scored.get("label", ""))
    if "quality" in found:
        parts.append("## Quality")
    if scored:
        what = "names, each with all its seeds" if scored.get("resampled") == "names" else "images"
        parts.append(
            f"{scored['label']} is the distance to {scored['reference']} "
            f"({scored['reference_count'] or 'an unknown number of'} images), lower is better. Differences are paired, "
            f"by the same prompts and seeds; in brackets their 95 % interval by bootstrap over {what}, "
            f"{scored['resamples']} resamples."
        )
    if "quality" in found:
        parts += [found["quality"], *results["verdict"]]
    if "speed" in found:
        memory = (
            "allocated on the GPU" if "cuda" in run["environment"] else "resident in the process, which frees it late"
        )
        parts += [
            "## Speed",
            "Seconds are medians of interleaved rounds after a warm-up, UNet calls medians over all calls of a phase "
            f"(means with caching). Memory is the peak {memory}.",
            found["speed"],
        ]
    parts += [f"![{Path(name).stem}]({name})" for name in charts]
    return "\n\n".join(parts) + "\n"


# --- parts of rows ----------------------------------------------------------------------------------------------------

_CHARTS = ("speedup.png", "quality.png", "grid.webp")
_KEYS = ("ratio", "cache_interval", *(c.key for c in COLUMNS), *(f"{c.key}_ci" for c in COLUMNS if c.interval))


def _times(timing: Timing, timings: Sequence[Timing]) -> dict[str, Any]:
    workload = timing.workload
    same = {other.scenario: other for other in timings if other.workload == workload}
    sd = same.get("sd")
    out = {
        "size": workload.size,
        "batch_size": workload.batch_size,
        "compiled": "compiled" if workload.compile else None,
        "seconds": timing.seconds,
        "seconds_per_image": timing.seconds_per_image,
        "speedup_vs_sd": speed_up(sd.seconds if sd else None, timing.seconds),
        "peak_gb": timing.peak_gb,
        "peak_gb_per_image": timing.peak_gb_per_image,
        "note": timing.failed or _note(timing.seconds),
    }
    if timing.whole_seconds:
        rounds = len(timing.seconds)
        out["unet_whole_ms"] = statistics.median(timing.whole_seconds) * 1000
        if timing.cached_seconds:
            out["calls"] = f"{len(timing.whole_seconds) // rounds} + {len(timing.cached_seconds) // rounds}"
            out["unet_cached_ms"] = statistics.median(timing.cached_seconds) * 1000
    for phase in Phase:
        seconds = timing.unet_median(phase)
        out[f"unet_{phase.value}_ms"] = seconds and seconds * 1000
        fair = out["speedup_vs_sd"] is not None  # a round has many calls, all of the same few seconds
        out[f"unet_{phase.value}_speedup"] = _ratio(sd.unet_median(phase) if sd and fair else None, seconds)
    return out


def _compared(row: dict[str, Any], key: str, label: str, other: str) -> str:
    """The sentence on a row's difference to another scenario."""
    low, high = row[f"{key}_ci"]
    if low <= 0 <= high:
        said = f"no difference that {row['images']} images can show"
    else:
        said = "worse" if row[key] > 0 else "better"
    return f"{row['scenario']}: {label} {figure(row[key], (low, high), '{:+.2f}')} against {other}: {said}."


def _note(seconds: Sequence[float]) -> str:
    if 0 < len(seconds) < FEWEST:
        return "one round: no speed-up"
    spread = max(seconds, default=1.0) / min(seconds, default=1.0)
    return f"unstable: rounds differ by {spread - 1:.0%}" if spread > STABLE else ""


def _ratio(base: float | None, value: float | None) -> float | None:
    return base / value if base and value else None


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BenchError(f"{path.parent} has no {RESULTS}: give the --out of a run that has begun to measure") from None
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be read ({error})") from error
