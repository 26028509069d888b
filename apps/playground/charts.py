"""A line chart with a marker at every value, as SVG: no library and no script is needed to show it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 34, 62  # room for title, tick labels, axis title and legend
_COLOURS = ("#6366f1", "#f59e0b")

Points = Sequence[tuple[float, float]]


def line_chart(title: str, x_title: str, lines: Mapping[str, Points], level: tuple[str, float] | None = None) -> str:
    """Plot lines over a common x axis; the y axis begins at 0, so that a difference looks as large as it is.

    Args:
        title: above the chart, with the unit of y.
        x_title: below the x axis.
        lines: name to (x, y) points; every point gets a marker with its figures as tooltip.
        level: name and y of a dashed level line to compare with.

    Returns:
        The <svg> element; "" where there are no points.
    """
    lines = {name: sorted(points) for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = sorted({x for points in lines.values() for x, _ in points})
    top = max([y for points in lines.values() for _, y in points] + ([level[1]] if level else []))
    step = _nice_step(top)
    top = max(step, math.ceil(1.05 * top / step) * step)
    span = (xs[-1] - xs[0]) or 1.0

    def across(x: float) -> float:
        where = (x - xs[0]) / span if len(xs) > 1 else 0.5
        return _LEFT + 12 + where * (_WIDTH - _LEFT - _RIGHT - 24)

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - y / top * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f"<text x='{_LEFT}' y='18' font-size='14' font-weight='600'>{escape(title)}</text>"]
    for i in range(round(top / step) + 1):
        y = up(i * step)
        parts.append(f"<line class='rule' x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
        parts.append(f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{i * step:g}</text>")
    for x in xs:
        parts.append(f"<text x='{across(x):.1f}' y='{_HEIGHT - _BOTTOM + 17}' text-anchor='middle'>{x:g}</text>")
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f"<text x='{middle}' y='{_HEIGHT - _BOTTOM + 34}' text-anchor='middle'>{escape(x_title)}</text>")
    legend = []
    for (name, points), colour in zip(lines.items(), _COLOURS):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
        parts += [
            f"<circle cx='{across(x):.1f}' cy='{up(y):.1f}' r='4.5' fill='{colour}'>"
            f"<title>{escape(f'{name}, {x_title} {x:g}: {y:.3g}')}</title></circle>"
            for x, y in points
        ]
        legend.append((name, colour, ""))
    if level:
        y = up(level[1])
        style = f"stroke='{_COLOURS[1]}' stroke-width='2' stroke-dasharray='6 4'"
        parts.append(
            f"<line class='level' x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}' {style}>"
            f"<title>{escape(f'{level[0]}: {level[1]:.3g}')}</title></line>"
        )
        legend.append((level[0], _COLOURS[1], "stroke-dasharray='6 4'"))
    at = _LEFT
    for name, colour, dashes in legend:
        y = _HEIGHT - 10
        parts.append(f"<line x1='{at}' x2='{at + 24}' y1='{y - 4}' y2='{y - 4}' stroke='{colour}' "
                     f"stroke-width='2' {dashes}/><text x='{at + 30}' y='{y}'>{escape(name)}</text>")  # fmt: skip
        at += 50 + 7 * len(name)
    label = f"{title}, by {x_title}"
    return (
        f"<svg class='chart' viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{escape(label, quote=True)}'>"
        f"{''.join(parts)}</svg>"
    )


def _nice_step(top: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides 0 … top into at most six parts."""
    rough = max(top, 1e-3) / 5
    power = 10 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
