"""The results of a sweep: rows of figures, a CSV, a sheet of all images, and what the times say."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from agentsd import AgentConfig
from agentsd.images.compare import are_stable, seconds_text
from agentsd.images.generate import GeneratedImage
from agentsd.images.methods import METHODS

from .figures import CLEARLY, unet_calls, why_unstable
from .images import distance, psnr
from .jobs import Case
from .settings import with_value


@dataclass(frozen=True)
class SweepRow:
    """One value of a sweep.

    Attributes:
        value: of the field that varies; None for the unpatched image.
        seconds, speed_up, distance: as in `Figures`, against the unpatched image.
        psnr: against the unpatched image, in dB.
    """

    value: float | None
    seconds: float
    speed_up: float
    distance: float
    psnr: float


def sweep_cases(config: AgentConfig, field: str, values: Sequence[float]) -> list[Case]:
    """The unpatched image, and one patched image for each value. Raises ValueError for an impossible value."""
    unpatched = Case(sweep_label(field, None), "sd", config)
    return [unpatched] + [
        Case(sweep_label(field, value), "agentsd", with_value(config, field, value)) for value in values
    ]


def sweep_rows(values: Sequence[float | None], generated: Sequence[GeneratedImage]) -> list[SweepRow]:
    """A row for each image; the first one is the unpatched image (value None)."""
    first = generated[0]
    rows = []
    for value, one in zip(values, generated):
        rmse = distance(first.image, one.image)
        rows.append(SweepRow(value, one.seconds, first.seconds / one.seconds, rmse, psnr(rmse)))
    return rows


def sweep_csv(field: str, rows: Sequence[SweepRow], generated: Sequence[GeneratedImage]) -> str:
    """The rows as CSV, with the seconds of every round."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    rounds = max(len(one.all_seconds) for one in generated)
    writer.writerow(
        ["method", field, "seconds", "speed_up", "rmse_to_unpatched", "psnr_to_unpatched_db"]
        + ["unet_calls_whole", "unet_calls_cached"]
        + [f"seconds_round_{i + 1}" for i in range(rounds)]
    )
    for row, one in zip(rows, generated):
        value = "" if row.value is None else f"{row.value:g}"
        figures = [f"{row.seconds:.4f}", f"{row.speed_up:.4f}", f"{row.distance:.4f}", f"{row.psnr:.3f}"]
        calls = unet_calls(one) or ("", "")
        writer.writerow([one.method, value, *figures, *calls, *(f"{s:.4f}" for s in one.all_seconds)])
    return out.getvalue()


def sweep_sheet(field: str, rows: Sequence[SweepRow], generated: Sequence[GeneratedImage]) -> Image.Image:
    """All images of a sweep side by side, with their figures, as one image."""
    width, height = generated[0].image.size
    size = max(13, width // 18)
    gap, caption = max(8, width // 32), int(size * 3.2)
    columns = math.ceil(math.sqrt(len(generated)))
    lines = math.ceil(len(generated) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, lines * (height + caption + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(size), ImageFont.load_default(int(size * 0.85))
    stable = are_stable(list(generated))
    for i, (row, one) in enumerate(zip(rows, generated)):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + caption + gap)
        sheet.paste(one.image, (left, top))
        pen.text((left, top + height + size // 4), sweep_label(field, row.value), font=large, fill="black")
        text = seconds_text(row.seconds, stable) + ("" if row.value is None else f",  distance {row.distance:.1f}")
        pen.text((left, top + height + size * 1.6), text, font=small, fill="#555555")
    return sheet


def sweep_settings(
    field: str, values: Sequence[float], generated: Sequence[GeneratedImage], config: AgentConfig
) -> dict[str, Any]:
    """What the sheet carries: the settings that all its images share, and which one varied."""
    return {
        **generated[-1].settings,
        "patch": dataclasses.asdict(config),
        "sweep": {"field": field, "values": list(values)},
    }


def sweep_label(field: str, value: float | None) -> str:
    """The title of one image of a sweep."""
    return METHODS["sd"] if value is None else f"{field} {value:g}"


def sweep_verdict(field: str, rows: Sequence[SweepRow], generated: Sequence[GeneratedImage]) -> str:
    """Say in plain sentences what the times of a sweep say."""
    if not are_stable(list(generated)):
        return f"No value can be called the fastest. {why_unstable(generated)}"
    fastest = max((row for row in rows if row.value is not None), key=lambda row: row.speed_up)
    if fastest.speed_up >= CLEARLY:
        return f"Fastest at {field} {fastest.value:g}: {fastest.speed_up:.2f}× as fast as unpatched."
    return f"No value was faster than unpatched (best {fastest.speed_up:.2f}×, at {field} {fastest.value:g})."
