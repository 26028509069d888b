"""The page of a chart of distance over time: tables, the chart, and all of it as data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentsd.config import PRESETS
from agentsd.files import write_atomically
from eval.common.tables import markdown, number, write_json

from .rows import FEWER_STEPS

_NAMES = {"psnr": "PSNR, dB", "ssim": "SSIM", "flip": "FLIP", "features": "features"}
_FORMS = {"psnr": "{:+.1f}", "ssim": "{:+.4f}", "flip": "{:+.4f}", "features": "{:+.4f}"}
_COLOURS = {"agentsd": "#2166ac", "deepcache": "#4d9221", "tomesd": "#e08214"}


def write_page(
    folder: Path,
    about: dict[str, Any],
    sets: dict[str, list[dict[str, Any]]],
    machines: Sequence[str],
    charted: Sequence[dict[str, Any]],
    shown: Sequence[str],
) -> None:
    """Write results.md, results.json and, where matplotlib is there, chart.png.

    Args:
        folder: of the files.
        about: command, machine, versions and model, in words.
        sets: "check" and "choice" to what `line.compare` says of all runs.
        machines: whose times the tables have.
        charted: what `line.compare` says of the chart's rows, of each run on the same images.
        shown: whose times the chart has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = {"about": about, "presets": {name: dict(fields) for name, fields in PRESETS.items()}, **sets}
    write_json(folder / "results.json", data)
    lines = ["# Distance over time", "", f"`{about['command']}`. " + " ".join(about["said"]), ""]
    for name, heading in (("check", "Images not used to choose"), ("choice", "Images used to choose settings")):
        entries = sets.get(name, [])
        if entries:
            lines += [f"## {heading}", ""]
        for run in dict.fromkeys(entry["run"] for entry in entries):
            own = [entry for entry in entries if entry["run"] == run]
            lines += [f"### {run}", "", tables(own, machines), ""]
    if charted and chart(charted, shown, folder / "chart.png"):
        lines += ["![PSNR over time](chart.png)", ""]
    write_atomically(folder / "results.md", "\n".join(lines))


def tables(entries: Sequence[dict[str, Any]], machines: Sequence[str]) -> str:
    """Markdown tables of a run's rows: distances; and beside fewer steps in the same time, PSNR and other metrics."""
    parts = [_distances(entries)]
    for metric, form in _FORMS.items():
        if any(metric in entry["machines"][machine] for entry in entries for machine in machines):
            parts.append(_beside_fewer_steps(entries, machines, metric, form))
    if any(entry["deepcache"] for entry in entries):
        parts.append(_beside_deepcache(entries))
    return "\n\n".join(parts)


def _distances(entries: Sequence[dict[str, Any]]) -> str:
    heading = ["", "images", "whole + cached calls", "PSNR, dB: median", "mean", "worst"]
    heading += [f"{_NAMES[metric]}: median (worst)" for metric in ("ssim", "flip", "features")]
    rows = []
    for entry in entries:
        distances = entry["distances"]
        cells = [entry["row"], entry["images"], f"{entry['whole']:g} + {entry['cached']:g}"]
        cells += [f"{distances['psnr'][kind]:.1f}" for kind in ("median", "mean", "worst")]
        for metric in ("ssim", "flip", "features"):
            own = distances.get(metric)
            cells.append("" if own is None else f"{own['median']:.4f} ({own['worst']:.4f})")
        rows.append(cells)
    return markdown(heading, rows, "lr")


def _beside_fewer_steps(entries: Sequence[dict[str, Any]], machines: Sequence[str], metric: str, form: str) -> str:
    heading = [f"nearer than fewer steps in the same time, {_NAMES[metric]}", *machines]
    rows = []
    for entry in entries:
        if entry["kind"] == FEWER_STEPS:
            continue
        cells = [entry["row"]]
        for machine in machines:
            own = entry["machines"][machine]
            cells.append(f"in {own['time']:.1f} steps: " + (_said(own[metric], form) if metric in own else "–"))
        rows.append(cells)
    return markdown(heading, rows, "lr")


def _beside_deepcache(entries: Sequence[dict[str, Any]]) -> str:
    rows = [
        [f"{entry['row']}, {entry['deepcache']['row']}", _said(entry["deepcache"], "{:+.1f}")]
        for entry in entries
        if entry["deepcache"]
    ]
    return markdown(["nearer than DeepCache, PSNR, dB", ""], rows, "lr")


def _said(pair: dict[str, Any], form: str) -> str:
    """As in "+5.2 [+3.5, +6.1], worst +1.0, 23 of 24"."""
    interval = f" [{', '.join(number(end, form) for end in pair['interval'])}]" if pair["interval"] else ""
    worst = number(pair["worst"], form)
    return f"{number(pair['nearer'], form)}{interval}, worst {worst}, {pair['images_nearer']} of {pair['images']}"


def chart(entries: Sequence[dict[str, Any]], machines: Sequence[str], path: Path) -> bool:
    """Median PSNR over time, a panel a run and machine. Returns whether there is matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = list(dict.fromkeys(entry["run"] for entry in entries))
    figure, panels = pyplot.subplots(
        len(machines), len(runs), figsize=(4.6 * len(runs), 3.8 * len(machines)), squeeze=False
    )
    for axes_of_machine, machine in zip(panels, machines):
        for axes, run in zip(axes_of_machine, runs):
            own = [entry for entry in entries if entry["run"] == run]
            line = [entry for entry in own if entry["kind"] == FEWER_STEPS]
            axes.plot(*zip(*(_place(entry, machine) for entry in line)), "o-", color="#777777", markersize=4)
            for entry in own:
                if entry["kind"] == FEWER_STEPS:
                    continue
                at = _place(entry, machine)
                axes.plot(*at, "o", color=_COLOURS[entry["kind"]])
                place, side = ((-4, -9), "right") if entry["kind"] == "deepcache" else ((4, 3), "left")
                name = entry["row"].replace("preset ", "")
                axes.annotate(name, at, place, textcoords="offset points", fontsize=7, horizontalalignment=side)
            axes.set_title(f"{run}, {machine}, {own[0]['images']} images", fontsize=9)
            axes.set_xlabel("time, in steps of the unpatched model; grey: fewer steps", fontsize=7)
            axes.set_ylabel("PSNR to the full run, median, dB", fontsize=7)
            axes.grid(alpha=0.3)
            axes.margins(x=0.12, y=0.1)  # room for the names
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _place(entry: dict[str, Any], machine: str) -> tuple[float, float]:
    return entry["machines"][machine]["time"], entry["distances"]["psnr"]["median"]
