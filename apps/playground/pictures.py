"""Pictures and figures made from drawings: differences, the sweep's sheet and table, captions."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from agentsd import AgentConfig
from agentsd.images.compare import STABLE, GeneratedImage, are_stable
from agentsd.images.methods import METHODS

CLEARLY = 1.02
"""Below this factor two times are called equal."""


# --- two pictures against each other ----------------------------------------------------------------------------------


def distance(first: Image.Image, second: Image.Image) -> float:
    """Root of the mean squared difference over all pixels and colours, in grey levels 0 … 255."""
    return float(np.sqrt(np.mean((_levels(first) - _levels(second)) ** 2)))


def psnr(rmse: float) -> float:
    """Peak signal-to-noise ratio in dB of pictures this far apart; infinite for equal ones."""
    return math.inf if rmse == 0 else 20 * math.log10(255 / rmse)


def difference_map(first: Image.Image, second: Image.Image, gain: float = 4.0) -> Image.Image:
    """Where two pictures differ: the greatest difference of the three colours times `gain`, white on black.

    Raises:
        ValueError: their sizes differ.
    """
    if first.size != second.size:
        raise ValueError(f"pictures of {first.size} and {second.size} pixels cannot be compared")
    apart = np.abs(_levels(first) - _levels(second)).max(axis=-1)
    return Image.fromarray(np.clip(apart * gain, 0, 255).round().astype(np.uint8))


def _levels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), dtype=np.float64)


def least_told_apart(rough: bool) -> float:
    """The smallest factor between two times that is called a difference."""
    return STABLE if rough else CLEARLY


# --- figures under the pictures ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What is said of one picture of a comparison.

    Attributes:
        seconds: median over the runs.
        runs: how many.
        speed_up: how many times as fast as the first; None for the first itself.
        peak_gb: greatest memory in use, 10⁹ bytes; None where it cannot be told.
        on_gpu: whether that is the GPU's memory or the whole process's.
        distance: to the first picture (`distance`); None for the first itself.
        rough: the times of the two do not tell how steady they are, or tell that they are not.
    """

    seconds: float
    runs: int
    speed_up: float | None
    peak_gb: float | None
    on_gpu: bool
    distance: float | None
    rough: bool

    @classmethod
    def of(cls, drawing: GeneratedImage, first: GeneratedImage | None) -> Figures:
        is_first = first is None or first is drawing
        return cls(
            drawing.seconds,
            len(drawing.all_seconds),
            None if is_first else first.seconds / drawing.seconds,
            None if drawing.peak_bytes is None else drawing.peak_bytes / 1e9,
            str(drawing.settings.get("device", "")).startswith("cuda"),
            None if is_first else distance(first.image, drawing.image),
            not are_stable([drawing] if first is None else [first, drawing]),
        )


def verdict(drawings: Sequence[GeneratedImage]) -> str:
    """What the times say of the last method against the first, in one or two plain sentences."""
    first, last = drawings[0], drawings[-1]
    factor = first.seconds / last.seconds
    steady = are_stable(list(drawings))
    clearly = least_told_apart(rough=not steady)
    names = METHODS[last.method], METHODS[first.method]
    if factor >= clearly:
        text = f"{names[0]} was {factor:.2f}× as fast as {names[1]}."
    elif factor > 1 / clearly and not steady:
        text = f"{names[0]} took about as long as {names[1]} ({factor:.2f}×), as far as rough times can tell."
    elif factor > 1 / clearly:
        text = f"{names[0]} took as long as {names[1]} ({factor:.2f}×): nothing is gained at this size."
    else:
        text = f"{names[0]} was slower than {names[1]} here ({factor:.2f}×)."
    width, height = last.image.size
    if factor < clearly and max(width, height) <= 512:
        text += f" At {width} × {height} px these layers have little to save."
    if not steady:
        runs = len(first.all_seconds)
        how = "one run each after a warm-up" if runs == 1 else f"the {runs} rounds of a method disagree"
        text += f" Rough times: {how}" + ("; more timed rounds tell how steady they are." if runs == 1 else ".")
    else:
        text += f" Medians of {len(first.all_seconds)} interleaved rounds after a warm-up, which agree."
    return text


# --- a sweep ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepRow:
    """One value of a sweep.

    Attributes:
        value: of the field that varies; None for the unpatched picture.
        seconds, speed_up, distance, psnr: as in `Figures`; the last two against the unpatched picture.
    """

    value: float | None
    seconds: float
    speed_up: float
    distance: float
    psnr: float


def sweep_rows(values: Sequence[float | None], drawings: Sequence[GeneratedImage]) -> list[SweepRow]:
    """A row for each drawing; the first one is the unpatched picture (value None)."""
    first = drawings[0]
    rows = []
    for value, drawing in zip(values, drawings):
        apart = distance(first.image, drawing.image)
        rows.append(SweepRow(value, drawing.seconds, first.seconds / drawing.seconds, apart, psnr(apart)))
    return rows


def sweep_csv(field: str, rows: Sequence[SweepRow], drawings: Sequence[GeneratedImage]) -> str:
    """The rows as CSV, with the seconds of every run."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    rounds = max(len(drawing.all_seconds) for drawing in drawings)
    writer.writerow(
        ["method", field, "seconds", "speed_up", "rmse_to_unpatched", "psnr_to_unpatched_db"]
        + [f"seconds_round_{i + 1}" for i in range(rounds)]
    )
    for row, drawing in zip(rows, drawings):
        value = "" if row.value is None else f"{row.value:g}"
        figures = [f"{row.seconds:.4f}", f"{row.speed_up:.4f}", f"{row.distance:.4f}", f"{row.psnr:.3f}"]
        writer.writerow([drawing.method, value, *figures, *(f"{s:.4f}" for s in drawing.all_seconds)])
    return out.getvalue()


def sweep_sheet(field: str, rows: Sequence[SweepRow], drawings: Sequence[GeneratedImage]) -> Image.Image:
    """All pictures of a sweep side by side, with their figures, as one picture."""
    width, height = drawings[0].image.size
    size = max(13, width // 18)
    gap, caption = max(8, width // 32), int(size * 3.2)
    columns = math.ceil(math.sqrt(len(drawings)))
    lines = math.ceil(len(drawings) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, lines * (height + caption + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(size), ImageFont.load_default(int(size * 0.85))
    for i, (row, drawing) in enumerate(zip(rows, drawings)):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + caption + gap)
        sheet.paste(drawing.image, (left, top))
        pen.text((left, top + height + size // 4), sweep_label(field, row.value), font=large, fill="black")
        text = f"{row.seconds:.2f} s" + ("" if row.value is None else f",  distance {row.distance:.1f}")
        pen.text((left, top + height + size * 1.6), text, font=small, fill="#555555")
    return sheet


def sweep_settings(
    field: str, values: Sequence[float], drawings: Sequence[GeneratedImage], config: AgentConfig
) -> dict[str, Any]:
    """What the sheet carries: the settings that all its pictures share, and which one varied."""
    return {
        **drawings[-1].settings,
        "patch": dataclasses.asdict(config),
        "sweep": {"field": field, "values": list(values)},
    }


def sweep_label(field: str, value: float | None) -> str:
    """What a picture of a sweep is called."""
    return METHODS["sd"] if value is None else f"{field} {value:g}"


def sweep_verdict(field: str, rows: Sequence[SweepRow], drawings: Sequence[GeneratedImage]) -> str:
    """What the times of a sweep say, in one or two plain sentences."""
    patched = [row for row in rows if row.value is not None]
    fastest = max(patched, key=lambda row: row.speed_up)
    if not are_stable(list(drawings)):
        runs = len(drawings[0].all_seconds)
        why = "one run each after a warm-up; more timed rounds are steadier" if runs == 1 else "the rounds disagree"
        slowest = min(patched, key=lambda row: row.speed_up)
        return f"{slowest.speed_up:.2f}× to {fastest.speed_up:.2f}× as fast as unpatched. Rough times: {why}."
    if fastest.speed_up >= CLEARLY:
        return f"Fastest at {field} {fastest.value:g}: {fastest.speed_up:.2f}× as fast as unpatched."
    return f"No value was faster than unpatched (best {fastest.speed_up:.2f}×, at {field} {fastest.value:g})."
