"""Turns what a run left on disk into tables, plots, a grid of pictures and a sentence; computes no score itself.

A folder of results holds run.json (what was asked), latency.json and scores.json (what was measured), and from these
results.json, results.csv, results.md, *.png.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from agentsd import Phase

from .fingerprint import package_versions
from .generation import is_whole, write_whole
from .latency import Timing, Workload
from .protocol import CONTROLS, BenchError, Scenario

RUN, LATENCY, SCORES = "run.json", "latency.json", "scores.json"
_GRID_PROMPTS, _GRID_CELL = 6, 160

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("scenario", "scenario", "{}"),
    ("size", "px", "{}"),
    ("batch_size", "batch", "{}"),
    ("compiled", "compiled", "{}"),
    ("images", "images", "{}"),
    ("fid", "FID", "{:.2f}"),
    ("fid_ci", "95 %", "{:.2f}"),
    ("fid_difference", "FID − sd", "{:+.2f}"),
    ("fid_difference_ci", "95 %", "{:+.2f}"),
    ("fid_difference_tomesd", "FID − tomesd", "{:+.2f}"),
    ("fid_difference_tomesd_ci", "95 %", "{:+.2f}"),
    ("fd", "{label}", "{:.2f}"),
    ("fd_ci", "95 %", "{:.2f}"),
    ("fd_difference", "FD − sd", "{:+.2f}"),
    ("fd_difference_ci", "95 %", "{:+.2f}"),
    ("fd_difference_tomesd", "FD − tomesd", "{:+.2f}"),
    ("fd_difference_tomesd_ci", "95 %", "{:+.2f}"),
    ("kid", "KID", "{:.5f}"),
    ("kid_deviation", "±", "{:.5f}"),
    ("psnr", "PSNR to sd, dB", "{:.1f}"),
    ("ssim", "SSIM to sd", "{:.4f}"),
    ("feature_distance", "feature distance to sd", "{:.4f}"),
    ("clip_score", "CLIP score", "{:.2f}"),
    ("seconds_per_image", "s / image", "{:.3f}"),
    ("seconds_quartiles", "quartiles", "{:.3f}"),
    ("speedup_vs_sd", "× sd", "{:.2f}"),
    ("speedup_vs_naive", "× sd-naive", "{:.2f}"),
    ("unet_agent_ms", "UNet call, agent phase, ms", "{:.1f}"),
    ("unet_agent_speedup", "× sd", "{:.2f}"),
    ("unet_agent_over_limit", "over the limit", "{:.3f}"),
    ("unet_merge_ms", "merge phase, ms", "{:.1f}"),
    ("unet_merge_speedup", "× sd", "{:.2f}"),
    ("unet_merge_over_limit", "over the limit", "{:.3f}"),
    ("unet_agent_operators", "operators, agent phase", "{}"),
    ("unet_merge_operators", "merge phase", "{}"),
    ("peak_gb", "peak GB", "{:.2f}"),
    ("peak_gb_per_image", "GB / image over the model", "{:.2f}"),
    ("note", "note", "{}"),
)
"""Key of a row, heading in the Markdown table, format. Columns without any value are left out of the table."""


def write_report(folder: Path, pictures: Path | None = None) -> list[dict[str, Any]]:
    """Write results.json, .csv, .md, plots and grid from run.json, latency.json and scores.json.

    Args:
        folder: of the results.
        pictures: of the scenarios' folders, for the grid; None takes those in `folder`.

    Returns:
        The rows.

    Raises:
        BenchError: there is nothing to report on, or the folder cannot be written to.
    """
    run = _read(folder / RUN)
    if run is None:
        raise BenchError(f"{folder} has no {RUN}: give the --out of a run that has got as far as measuring")
    timings = [Timing.from_dict(item) for item in (_read(folder / LATENCY) or {}).get("timings", [])]
    scores = _read(folder / SCORES) or {}
    rows = make_rows(run, timings, scores)
    sentences = verdict(rows, scores)
    result = {"run": run, "rows": rows, "verdict": sentences}
    try:
        write_whole(folder / "results.json", json.dumps(_plain(result), indent=1, ensure_ascii=False) + "\n")
        write_whole(folder / "results.csv", as_csv(rows, run["environment"]))
        plots = draw_plots(rows, scores.get("label", ""), folder, run["environment"])
        if draw_grid(run, pictures or folder / "images", folder / "grid.png"):
            plots.append("grid.png")
        write_whole(folder / "results.md", as_markdown(rows, run, scores, sentences, plots))
    except OSError as error:
        raise BenchError(f"{folder} cannot be written to ({error.strerror or error})") from error
    return rows


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Begin a report: what was asked of this run."""
    write_whole(folder / RUN, json.dumps(run, indent=1, ensure_ascii=False) + "\n")


def write_part(folder: Path, name: str, part: dict[str, Any]) -> None:
    """Write latency.json or scores.json."""
    write_whole(folder / name, json.dumps(_plain(part), indent=1, ensure_ascii=False) + "\n")


def scenario_row(scenario: Scenario) -> dict[str, Any]:
    """A scenario as the first columns of its row."""
    config = scenario.config
    agents = config if scenario.method in ("agentsd", *CONTROLS) else None
    mixing = config if scenario.method == "agentsd" else None
    return {
        "scenario": scenario.name,
        "method": scenario.method,
        "ratio": config.ratio if config else 0.0,
        "early": agents and agents.early,
        "alpha": mixing and mixing.alpha,
        "broadcast_exponent": mixing and mixing.broadcast_exponent,
        "late": mixing and mixing.late,
        "merge_stride": mixing and mixing.merge_stride,
        "max_agents": mixing and mixing.max_agents,
        "max_keys": mixing and mixing.max_keys,
        "match_tile": mixing and mixing.match_tile,
        "deepcache_interval": scenario.cache_interval,
    }


def make_rows(run: dict[str, Any], timings: Sequence[Timing], scores: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per scenario and workload: settings, scores, times. What was not measured is None.

    Scores are of pictures of one size, drawn in batches of one size, by a UNet that was not compiled: they stand in a
    row with the times of just that, and in one of their own where that was not timed.
    """
    rows = []
    for base in run["scenarios"]:
        own = [timing for timing in timings if timing.scenario == base["scenario"]]
        score = scores.get("rows", {}).get(base["scenario"])
        drawn = _timing_of_drawn(run, own)
        if score and drawn is None:
            rows.append({**_empty(), **base, **_drawn(run), **score})
        for timing in own:
            rows.append({**_empty(), **base, **((timing is drawn and score) or {}), **_times(timing, timings)})
    order = {base["scenario"]: i for i, base in enumerate(run["scenarios"])}
    workload = lambda row: (row["compiled"] or "", row["size"] or 0, row["batch_size"] or 0)  # noqa: E731
    return sorted(rows, key=lambda row: (workload(row), order[row["scenario"]]))


def timed_apart(workloads: Sequence[Workload], size: int, batch_size: int) -> str:
    """A sentence, after a space, on what was timed, for a run's protocol; "" where that is just what was drawn.

    Args:
        workloads: that are timed; a size of None is the one drawn. None at all: nothing was timed.
        size: height and width of the pictures drawn, in pixels.
        batch_size: pictures per call as they were drawn.
    """
    sizes = list(dict.fromkeys(workload.size or size for workload in workloads))
    batches = list(dict.fromkeys(workload.batch_size for workload in workloads))
    if not workloads or (sizes == [size] and batches == [batch_size]):
        return ""
    return f" Timed at {', '.join(map(str, sizes))} px, batch {', '.join(map(str, batches))}."


def verdict(rows: Sequence[dict[str, Any]], scores: dict[str, Any]) -> list[str]:
    """What the scores say of agent attention's effect on quality, in sentences; none without scores.

    AgentSD is held against Stable Diffusion, as ToMeSD is, and against ToMeSD at the same ratio. The latter has an
    interval of its own: two methods drawn from the same seeds may differ for certain where their intervals against
    Stable Diffusion overlap.

    Args:
        rows: as make_rows gives them.
        scores: what scores.json holds.
    """
    key = "fid_difference" if scores.get("features") == "inception" else "fd_difference"
    label = scores.get("label", "")
    scored = [row for row in rows if row.get(key) is not None]
    if not scored:
        return []
    plain = [row for row in scored if row["deepcache_interval"] == 1]
    merged = {row["ratio"]: row["scenario"] for row in plain if row["method"] == "tomesd"}
    sentences = []
    for row in scored:
        if row["method"] in ("agentsd", "tomesd"):
            sentences.append(_compared(row, key, label, "sd"))
        if row.get(f"{key}_tomesd") is not None:
            sentences.append(_compared(row, f"{key}_tomesd", label, merged[row["ratio"]]))
    controls = [row for row in scored if row["method"] in CONTROLS]
    agents = [row for row in scored if row["method"] == "agentsd"]
    for row in controls:
        low, high = row[f"{key}_ci"]
        least = min((agent[key] for agent in agents), default=0.0)
        text = f"Control {row['scenario']}: {row[key]:+.2f} [{low:+.2f}, {high:+.2f}]"
        if low <= max(0.0, least):
            sentences.append(
                f"{text}. Taking this attention away costs no more than replacing it, or nothing that shows: this "
                "model and this score hardly see it, so they cannot tell attention methods apart."
            )
        else:
            sentences.append(f"{text}: this is what losing that attention costs; methods are to be read against it.")
    images = scored[0]["images"]
    if images < scores.get("feature_size", 0):
        sentences.append(
            f"{images} pictures are fewer than the {scores['feature_size']} features: the distance itself is biased "
            "upward and only differences at equal numbers mean something. One seed per picture; another --seed is "
            "another sample."
        )
    return sentences


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The machine and the software a run was made with."""
    found: dict[str, Any] = {
        "device": _device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "attention_backend": _attention_backend(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": package_versions(),
        "commit": _commit(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
    return found


def as_csv(rows: Sequence[dict[str, Any]], environment: dict[str, Any]) -> str:
    """The rows with all their columns, an interval in two, and the environment in each row."""
    flat = []
    for row in rows:
        out: dict[str, Any] = {}
        for key, value in row.items():
            if key.endswith(("_ci", "_quartiles")):
                out[f"{key}_low"], out[f"{key}_high"] = value or (None, None)
            else:
                out[key] = value
        flat.append({**out, "environment": environment_line(environment)})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]) if flat else ["scenario"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def table(
    rows: Sequence[dict[str, Any]],
    label: str = "",
    columns: Sequence[tuple[str, str, str]] = COLUMNS,
    texts: Sequence[str] = ("scenario", "note"),
) -> str:
    """The rows as a Markdown table; columns without any value are left out.

    Args:
        label: of the Fréchet distance.
        columns: as COLUMNS.
        texts: keys of the columns that hold words, which stand to the left.
    """
    columns = [column for column in columns if any(row.get(column[0]) not in (None, "") for row in rows)]
    lines = [
        "| " + " | ".join(heading.format(label=label) for _, heading, _ in columns) + " |",
        "|" + "|".join(" --- " if key in texts else " ---: " for key, _, _ in columns) + "|",
    ]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(key), form) for key, _, form in columns) + " |")
    return "\n".join(lines)


def environment_line(environment: dict[str, Any]) -> str:
    """The environment as one line of text."""
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    return (
        f"{environment['device']}, {environment['dtype']}, {environment['attention_backend']}, "
        f"{environment['threads']} CPU threads, Python {environment['python']}, {versions}, "
        f"commit {environment['commit']}"
    )


def as_markdown(
    rows: Sequence[dict[str, Any]],
    run: dict[str, Any],
    scores: dict[str, Any],
    sentences: Sequence[str],
    plots: Sequence[str],
) -> str:
    """The whole report as text."""
    parts = [f"# {run['title']}", f"`{run['command']}`", environment_line(run["environment"]), run["protocol"]]
    if scores:
        by_name = scores.get("resampled") == "names"
        compared = any(row[f"{key}_difference_tomesd"] is not None for row in rows for key in ("fid", "fd"))
        parts.append(
            f"{scores['label']} against {scores['reference']} ({scores['reference_count'] or 'an unknown number of'} "
            f"pictures). Intervals: bootstrap over {'names, each with all its seeds' if by_name else 'pictures'}, "
            f"{scores['resamples']} resamples, 95 %; differences are paired, with the same "
            f"{'names' if by_name else 'pictures'} left out of both"
            + ("; those to tomesd are to the same ratio without DeepCache" if compared else "")
            + ". The reference is held fixed. Intervals of the distance itself are too wide rather than too narrow: "
            "compare methods by the differences."
        )
    parts += [table(rows, scores.get("label", "")), *sentences]
    if any(row["peak_gb"] is not None for row in rows):
        what = (
            "allocated on the GPU"
            if "cuda" in run["environment"]
            else "resident in the process, which never gives all back"
        )
        parts.append(f"Peak memory is what was {what}. Seconds are medians of interleaved rounds after a warm-up.")
    if any(row["deepcache_interval"] > 1 and row["unet_merge_ms"] is not None for row in rows):
        parts.append("With DeepCache a UNet call is whole or nearly free; its milliseconds are means over both kinds.")
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in plots]
    return "\n\n".join(parts) + "\n"


# --- pictures ---------------------------------------------------------------------------------------------------------

_SHADES = ("Greys", "Oranges", "Blues", "Greens", "Purples", "Reds")  # of the methods, by ratio from light to dark


def draw_plots(rows: Sequence[dict[str, Any]], label: str, folder: Path, environment: dict[str, Any]) -> list[str]:
    """quality.png, memory.png, speedup.png, as far as there is something to show. Returns their names."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []

    def save(name: str, figure: Any) -> None:
        # Below all that the axes need, whatever the height of the figure.
        figure.canvas.draw()
        bottom = figure.get_tightbbox().y0 / figure.get_figheight()
        line = "\n".join(textwrap.wrap(environment_line(environment), 130))
        figure.text(0.01, bottom, line, fontsize=5, color="#666666", va="top")
        figure.savefig(folder / name, dpi=130, bbox_inches="tight")
        pyplot.close(figure)
        drawn.append(name)

    key = "fid" if any(row["fid"] is not None for row in rows) else "fd"
    both = [row for row in rows if row[key] is not None and row["seconds_per_image"] is not None]
    if len(both) > 1:
        figure, axes = pyplot.subplots(figsize=(6, 4))
        for method, group in _by_method(both):
            axes.errorbar(
                [row["seconds_per_image"] for row in group],
                [row[key] for row in group],
                xerr=_bars(group, "seconds_per_image", "seconds_quartiles"),
                yerr=_bars(group, key, f"{key}_ci"),
                marker="o", capsize=3, label=method,
            )  # fmt: skip
            for row in group:
                if row["ratio"]:
                    at = (row["seconds_per_image"], row[key])
                    axes.annotate(f" {row['ratio']:g}", at, fontsize=7)
        axes.set(xlabel="seconds per image", ylabel=f"{label}, lower is better")
        axes.legend()
        save("quality.png", figure)
    held = [row for row in rows if row["peak_gb_per_image"] is not None]
    if held:
        figure, axes = pyplot.subplots(figsize=(6, 0.4 + 0.3 * len(held)))
        names = [
            f"{row['scenario']} {row['size']} px, batch {row['batch_size']}{row['compiled'] or ''}" for row in held
        ]
        axes.barh(names, [row["peak_gb_per_image"] for row in held])
        axes.invert_yaxis()
        axes.set(xlabel="peak GB per image over the loaded model")
        save("memory.png", figure)
    timed = [row for row in rows if row["speedup_vs_sd"] is not None and not row["compiled"]]
    batch = min((row["batch_size"] for row in timed), default=1)
    timed = [row for row in timed if row["batch_size"] == batch]
    if len({row["size"] for row in timed}) > 1:
        figure, axes = pyplot.subplots(figsize=(6, 4))
        for (_, group), shades in zip(_by_method(timed), itertools.cycle(_SHADES)):
            names = list(dict.fromkeys(row["scenario"] for row in group))
            for number, name in enumerate(names):
                points = [(row["size"], row["speedup_vs_sd"]) for row in group if row["scenario"] == name]
                colour = pyplot.get_cmap(shades)(0.4 + 0.5 * (number + 1) / len(names))
                axes.plot(*zip(*points), marker="o", label=name, color=colour)
        axes.set(xlabel="height and width in pixels", ylabel=f"speed-up over sd (SDPA), batch {batch}")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        save("speedup.png", figure)
    return drawn


def draw_grid(run: dict[str, Any], pictures: Path, path: Path) -> bool:
    """The same prompts under each method, labelled. Returns whether there was anything to show."""
    names = [row["scenario"] for row in run["scenarios"] if (pictures / row["scenario"]).is_dir()]
    files = run.get("files", [])
    files = files[:: max(1, len(files) // _GRID_PROMPTS)][:_GRID_PROMPTS]
    if not names or not files:
        return False
    cell, head, side = _GRID_CELL, 36, 130
    width = side + cell * len(names)
    foot = textwrap.wrap(f"{run['command']}: {environment_line(run['environment'])}", width // 6)
    canvas = Image.new("RGB", (width, head + cell * len(files) + 14 * len(foot) + 6), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    pen.text((6, head + cell * len(files) + 2), "\n".join(foot), font=ImageFont.load_default(10), fill="#666666")
    for column, name in enumerate(names):
        words = name.split("-")
        lines = [name] if pen.textlength(name, font=font) < cell - 6 else ["-".join(words[:2]), "-".join(words[2:])]
        pen.text((side + column * cell + 4, 4), "\n".join(lines), font=font, fill="black")
        for row, file in enumerate(files):
            picture = pictures / name / file
            if is_whole(picture):
                with Image.open(picture) as image:
                    small = image.convert("RGB").resize((cell - 4, cell - 4), Image.Resampling.LANCZOS)
                canvas.paste(small, (side + column * cell + 2, head + row * cell + 2))
    for row, file in enumerate(files):
        label = file.split("-", 1)[1].rsplit("-", 1)[0].replace("_", "\n")
        pen.text((6, head + row * cell + cell // 3), label, font=font, fill="black")
    canvas.save(path)
    return True


def _by_method(rows: Iterable[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cached = f" + DeepCache {row['deepcache_interval']}" if row["deepcache_interval"] > 1 else ""
        groups.setdefault(row["method"] + cached, []).append(row)
    return list(groups.items())


def _bars(rows: Sequence[dict[str, Any]], key: str, interval: str) -> list[list[float]] | None:
    if any(row[interval] is None for row in rows):
        return None
    below = [max(0.0, row[key] - row[interval][0]) for row in rows]
    return [below, [max(0.0, row[interval][1] - row[key]) for row in rows]]


# --- parts of rows ----------------------------------------------------------------------------------------------------


def _empty() -> dict[str, Any]:
    settings = ("method", "ratio", "early", "alpha", "broadcast_exponent", "late", "deepcache_interval")
    return dict.fromkeys(["scenario", *settings, *(key for key, _, _ in COLUMNS[1:])])


def _timing_of_drawn(run: dict[str, Any], timings: Sequence[Timing]) -> Timing | None:
    """Of one scenario's timings the one that is of what was drawn."""
    if "batch_size" not in run:  # of a version that did not note it, and took a single timing for that of the pictures
        return timings[0] if len(timings) == 1 else None
    wanted = (run["size"], run["batch_size"], False)
    for timing in timings:
        if (timing.workload.size, timing.workload.batch_size, timing.workload.compile) == wanted:
            return timing
    return None


def _drawn(run: dict[str, Any]) -> dict[str, Any]:
    return {"size": run["size"], "batch_size": run["batch_size"]} if "batch_size" in run else {}


def _times(timing: Timing, timings: Sequence[Timing]) -> dict[str, Any]:
    workload = timing.workload
    same = {other.scenario: other for other in timings if other.workload == workload}
    # What was timed apart has no rounds in common with sd: on a machine that others use the ratio came out as 1.9.
    sd, naive, limit = (None if timing.note else same.get(name) for name in ("sd", "sd-naive", "limit"))
    out = {
        "size": workload.size,
        "batch_size": workload.batch_size,
        "compiled": "compiled" if workload.compile else None,
        "seconds_per_image": timing.seconds_per_image,
        "seconds_quartiles": timing.quartiles,
        "speedup_vs_sd": _ratio(sd and sd.seconds_per_image, timing.seconds_per_image),
        "speedup_vs_naive": _ratio(naive and naive.seconds_per_image, timing.seconds_per_image),
        "peak_gb": timing.peak_gb,
        "peak_gb_per_image": timing.peak_gb_per_image,
        "note": timing.failed or timing.note,
    }
    for phase in Phase:
        seconds = timing.unet_median(phase)
        out[f"unet_{phase.value}_ms"] = seconds and seconds * 1000
        out[f"unet_{phase.value}_speedup"] = _ratio(sd and sd.unet_median(phase), seconds)
        out[f"unet_{phase.value}_operators"] = timing.operators.get(phase.value)
        out[f"unet_{phase.value}_over_limit"] = _ratio(seconds, limit and limit.unet_median(phase))
    return out


def _compared(row: dict[str, Any], key: str, label: str, other: str) -> str:
    """The sentence on a row's difference to another scenario."""
    low, high = row[f"{key}_ci"]
    if low <= 0 <= high:
        said = f"no difference that {row['images']} pictures can show"
    else:
        said = "worse" if row[key] > 0 else "better"
    figures = f"{row[key]:+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"{row['scenario']}: {label} {figures} against {other}, lower is better: {said}."


def _ratio(base: float | None, value: float | None) -> float | None:
    return base / value if base and value else None


def _cell(value: Any, form: str) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, (list, tuple)):
        return " … ".join(form.format(part) for part in value)
    return form.format(value)


def _plain(value: Any) -> Any:
    """JSON knows no infinity: the PSNR of equal pictures is written as a word."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restored(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_restored(part) for part in value]
    return float(value) if value in ("inf", "-inf", "nan") else value


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return _restored(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be read ({error})") from error


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{device.type.upper()} {name or platform.machine()} ({os.cpu_count()} cores)"


def _attention_backend(device: torch.device) -> str:
    if device.type != "cuda":
        return "SDPA"
    kinds = {"flash": "flash", "mem_efficient": "memory-efficient", "cudnn": "cuDNN", "math": "math"}
    enabled = [name for key, name in kinds.items() if getattr(torch.backends.cuda, f"{key}_sdp_enabled")()]
    return f"SDPA ({', '.join(enabled)} allowed)"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
