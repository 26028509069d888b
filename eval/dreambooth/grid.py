"""grid_image: the subject, the same seeds by every row, and the class before and after, with captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from eval.fid.images import read_image, save_grid

from .plan import Plan, Row
from .sampling import shots_of
from .scoring import subject_files

_CELL, _GAP, _SIDE, _SHOWN = 196, 6, 96, 4
_GREY = "#555555"


def grid_image(plan: Plan, out: Path, path: Path, captions: dict[str, str], footer: str) -> None:
    """Write the grid as a PNG.

    Args:
        captions: second line of each row's caption, by its name.
        footer: the machine, in small print.
    """
    columns = max(len(plan.rows), len(plan.prior_rows))
    width = _SIDE + columns * (_CELL + _GAP) + _GAP
    parts = [_subject_strip(plan, width), _images(plan, out, plan.rows, captions, width)]
    if plan.prior_rows:
        parts += [
            _line(f"The class, “{plan.class_prompt}”: is the prior kept?", width, 15),
            _images(plan, out, plan.prior_rows, captions, width),
        ]
    parts.append(_line(footer, width, 10, _GREY))
    canvas = Image.new("RGB", (width, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        canvas.paste(part, (0, top))
        top += part.height
    save_grid(canvas, path)


def _subject_strip(plan: Plan, width: int) -> Image.Image:
    files = subject_files(plan)
    side = min(_CELL // 2, (width - _SIDE) // max(1, len(files)) - _GAP)
    strip = Image.new("RGB", (width, side + 3 * _GAP), "white")
    pen = ImageDraw.Draw(strip)
    _write(pen, (_GAP, _GAP), textwrap.wrap("the subject", 11), 14, "black")
    for number, file in enumerate(files):
        image = read_image(file)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        strip.paste(image, (_SIDE + number * (side + _GAP), _GAP))
    return strip


def _images(plan: Plan, out: Path, rows: Sequence[Row], captions: dict[str, str], width: int) -> Image.Image:
    """A column for each row of the plan, its caption above; a line of images for each seed."""
    shots = [shots_of(plan, row, out) for row in rows]
    lines = range(min(_SHOWN, len(shots[0])))
    heads = [(textwrap.wrap(row.title, 27), textwrap.wrap(captions.get(row.name, ""), 32)) for row in rows]
    head = max(17 * len(title) + 14 * len(more) for title, more in heads) + 2 * _GAP
    canvas = Image.new("RGB", (width, head + len(lines) * (_CELL + _GAP) + _GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for column, ((title, more), own) in enumerate(zip(heads, shots)):
        left = _SIDE + column * (_CELL + _GAP)
        _write(pen, (left, _GAP), title, 14, "black")
        _write(pen, (left, _GAP + 17 * len(title)), more, 11, _GREY)
        for line in lines:
            image = read_image(own[line].path).resize((_CELL, _CELL), Image.Resampling.LANCZOS)
            canvas.paste(image, (left, head + line * (_CELL + _GAP)))
    for line in lines:
        shot = shots[0][line]
        label = [*textwrap.wrap(f"“{shot.prompt}”", 14), f"seed {shot.seed}"]
        _write(pen, (_GAP, head + line * (_CELL + _GAP) + _CELL // 3), label, 12, "black")
    return canvas


def _line(text: str, width: int, size: int, colour: str = "black") -> Image.Image:
    rows = textwrap.wrap(text, int(width / (0.53 * size)))
    part = Image.new("RGB", (width, int(1.25 * size * len(rows)) + 2 * _GAP), "white")
    _write(ImageDraw.Draw(part), (_GAP, _GAP), rows, size, colour)
    return part


def _write(pen: Any, place: tuple[int, int], lines: Sequence[str], size: int, colour: str) -> None:
    font = ImageFont.load_default(size)
    for number, text in enumerate(lines):
        pen.text((place[0], place[1] + int(number * 1.22 * size)), text, font=font, fill=colour)
