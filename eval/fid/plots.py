"""Charts of a report: speed-up by size and method, quality as difference to the unpatched images, a grid of images."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from agentsd.files import write_atomically

from .generation import is_whole
from .images import read_image, save_grid

_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1}
_GRID_PROMPTS, _GRID_CELL = 6, 160


def speed_chart(rows: Sequence[dict[str, Any]], path: Path, footer: str, colours: Mapping[str, str]) -> bool:
    """Speed-up over sd by size and scenario, as bars of each method's colour. Returns whether there is any to show."""
    rows = [row for row in rows if row["speedup_vs_sd"] is not None and row["scenario"] != "sd"]
    pyplot = _pyplot()
    if not rows or pyplot is None:
        return False
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        batch = f", batch {row['batch_size']}" if row["batch_size"] > 1 else ""
        groups.setdefault(f"{row['size']} px{batch}{', compiled' if row['compiled'] else ''}", []).append(row)
    figure, axes = pyplot.subplots(figsize=(7, 0.8 + 0.24 * (len(rows) + len(groups))))
    place, ticks = 0.0, []
    for group, own in groups.items():
        ticks.append((place + 0.1, group, "bold"))
        for row in own:
            place += 1
            axes.barh(place, row["speedup_vs_sd"], color=colours[row["method"]])
            text = f"{row['speedup_vs_sd']:.2f}×" + (", unstable" if (row["note"] or "").startswith("unstable") else "")
            axes.text(row["speedup_vs_sd"] + 0.02, place, text, va="center", fontsize=8, bbox=_BOX)
            ticks.append((place, row["scenario"], "normal"))
        place += 1
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks([at for at, _, _ in ticks], [name for _, name, _ in ticks], fontsize=8)
    for label, (_, _, weight) in zip(axes.get_yticklabels(), ticks):
        label.set_fontweight(weight)
    axes.invert_yaxis()
    axes.set(xlabel="speed-up over sd (diffusers with SDPA)", xlim=(0, 1.12 * max(r["speedup_vs_sd"] for r in rows)))
    return _save(figure, path, footer)


def quality_chart(
    rows: Sequence[dict[str, Any]], label: str, path: Path, footer: str, colours: Mapping[str, str]
) -> bool:
    """Each scenario's difference to the unpatched images, with its 95 % interval. Returns whether there is any."""
    key = "fid_difference" if any(row["fid_difference"] is not None for row in rows) else "fd_difference"
    rows = [row for row in rows if row[key] is not None]
    pyplot = _pyplot()
    if not rows or pyplot is None:
        return False
    figure, axes = pyplot.subplots(figsize=(7, 0.9 + 0.28 * len(rows)))
    for place, row in enumerate(rows):
        low, high = row[f"{key}_ci"]
        axes.plot([low, high], [place, place], color=colours[row["method"]])
        axes.plot(row[key], place, "o", color=colours[row["method"]])
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["scenario"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.15)
    axes.set(xlabel=f"{label} less that of the unpatched images, 95 % interval\n(lower is better)")
    return _save(figure, path, footer)


def grid_image(run: dict[str, Any], images: Path, path: Path, footer: str) -> bool:
    """The same prompts under each method, labelled. Returns whether there is anything to show."""
    names = [name for name in run["scenarios"] if (images / name).is_dir()]
    files = run.get("files", [])
    files = files[:: max(1, len(files) // _GRID_PROMPTS)][:_GRID_PROMPTS]
    if not names or not files:
        return False
    cell, head, side = _GRID_CELL, 36, 130
    width = side + cell * len(names)
    foot = textwrap.wrap(footer, width // 6)
    canvas = Image.new("RGB", (width, head + cell * len(files) + 14 * len(foot) + 6), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    pen.text((6, head + cell * len(files) + 2), "\n".join(foot), font=ImageFont.load_default(10), fill="#666666")
    for column, name in enumerate(names):
        words = name.split("-")
        lines = [name] if pen.textlength(name, font=font) < cell - 6 else ["-".join(words[:2]), "-".join(words[2:])]
        pen.text((side + column * cell + 4, 4), "\n".join(lines), font=font, fill="black")
        for row, file in enumerate(files):
            source = images / name / file
            if is_whole(source):
                small = read_image(source).resize((cell - 4, cell - 4), Image.Resampling.LANCZOS)
                canvas.paste(small, (side + column * cell + 2, head + row * cell + 2))
    for row, file in enumerate(files):
        label = file.split("-", 1)[1].rsplit("-", 1)[0].replace("_", "\n")
        pen.text((6, head + row * cell + cell // 3), label, font=font, fill="black")
    save_grid(canvas, path)
    return True


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path, footer: str) -> bool:
    figure.canvas.draw()
    bottom = figure.get_tightbbox().y0 / figure.get_figheight()  # below the axes' labels, whatever the figure's height
    figure.text(0.01, bottom, "\n".join(textwrap.wrap(footer, 130)), fontsize=5, color="#666666", va="top")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130, bbox_inches="tight"))
    _pyplot().close(figure)
    return True
