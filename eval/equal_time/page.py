"""The page of a chart of distance over time: tables, the chart, and all of it as data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentsd.config import PRESETS
from agentsd.files import write_atomically
from eval.common.tables import markdown, write_json

from .rows import FEWER_STEPS

_COLOURS = {"agentsd": "#2166ac", "deepcache": "#4d9221", "tomesd": "#e08214"}


def write_page(folder: Path, about: dict[str, Any], sets: dict[str, list[dict[str, Any]]], machines: list[str]) -> None:
    """Write results.md, results.json and, where matplotlib is there, chart.png.

    Args:
        folder: of the files.
        about: command, machine, versions and model, in words.
        sets: "check" and "choice" to what `line.compare` says of all runs.
        machines: whose times the tables and the chart have.
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
            lines += [f"### {run}, {own[0]['images']} images", "", table(own, machines), ""]
    if sets.get("check") and chart(sets["check"], machines, folder / "chart.png"):
        lines += ["![PSNR over time](chart.png)", ""]
    write_atomically(folder / "results.md", "\n".join(lines))


def table(entries: Sequence[dict[str, Any]], machines: Sequence[str]) -> str:
    """A Markdown table of a run's rows."""
    heading = ["", "whole + cached calls", "PSNR, dB: median", "mean", "worst", "SSIM"]
    for machine in machines:
        heading += [f"{machine}: time in steps", "fewer steps then, dB", "nearer by, dB (worst)"]
    rows = []
    for entry in entries:
        cells = [entry["row"], f"{entry['whole']:g} + {entry['cached']:g}"]
        cells += [f"{entry[f'psnr_{kind}']:.1f}" for kind in ("median", "mean", "worst")] + [
            f"{entry['ssim_mean']:.4f}"
        ]
        for machine in machines:
            cells.append(f"{entry[machine]:.1f}")
            line, nearer = entry.get(f"{machine}, fewer steps"), entry.get(f"{machine}, nearer")
            if line is None or nearer is None:
                cells += ["", ""]
            else:
                cells += [f"{line:.1f}", f"{nearer:+.1f} ({entry[f'{machine}, nearer, worst']:+.1f})"]
        rows.append(cells)
    return markdown(heading, rows, "lr")


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
            axes.plot([e[machine] for e in line], [e["psnr_median"] for e in line], "o-", color="#777777", markersize=4)
            for entry in own:
                if entry["kind"] == FEWER_STEPS:
                    continue
                at = (entry[machine], entry["psnr_median"])
                axes.plot(*at, "o", color=_COLOURS[entry["kind"]])
                axes.annotate(entry["row"].replace("preset ", ""), at, (4, 3), textcoords="offset points", fontsize=7)
            axes.set_title(f"{run}, {machine}", fontsize=9)
            axes.set_xlabel("time, in steps of the unpatched model; grey: fewer steps", fontsize=7)
            axes.set_ylabel("PSNR to the full run, median, dB", fontsize=7)
            axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
