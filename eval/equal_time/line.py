"""How near each row is to the full run's images, beside fewer steps that take the same time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from eval.common.fair_schedules import Run

from .call_times import CallTimes, time_of
from .rows import FEWER_STEPS, Row

MEASURED = "measured"

METRICS = {"psnr": 1, "ssim": 1, "flip": -1, "features": -1}
"""Distance of two images: 1 where more is nearer, -1 where less is."""


_Images = dict[int, dict[str, Any]]  # number of an image -> its line of `generation.read`


def at_time(line: Sequence[tuple[float, float]], time: float) -> float | None:
    """The line's distance at a time: straight in the logarithm of the time between two of its points.

    Args:
        line: (time, distance) of each point, times rising.
        time: in the same unit.

    Returns:
        None where the line does not reach so far.
    """
    for (before, low), (after, high) in pairwise(line):
        if before <= time <= after:
            return low + (high - low) * math.log(time / before) / math.log(after / before)
    return None


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a median by order statistics: exact for any distribution, as the sign test is.

    Fewer than 6 values have none: even their least and greatest enclose the median too rarely.
    """
    ordered, count = sorted(values), len(values)
    rank, outside = 0, 0.0  # values below the interval; chance that the median lies there
    while (outside := outside + math.comb(count, rank) / 2**count) <= 0.025:
        rank += 1
    return (ordered[rank - 1], ordered[count - rank]) if rank else None


def paired(own: Sequence[float], other: Sequence[float], sign: int = 1) -> dict[str, Any]:
    """How much nearer one row is than another one, image by image.

    Args:
        own, other: distances of the same images.
        sign: of METRICS.

    Returns:
        images: how many; other: its median; nearer: the median of the differences; interval of it
        (`median_interval`); worst difference; images_nearer: on how many images `own` is the nearer one.
    """
    differences = [sign * (a - b) for a, b in zip(own, other, strict=True)]
    return {
        "images": len(differences),
        "other": statistics.median(other),
        "nearer": statistics.median(differences),
        "interval": median_interval(differences),
        "worst": min(differences),
        "images_nearer": sum(difference > 0 for difference in differences),
    }


def compare(
    run: Run, rows: Sequence[Row], results: Iterable[dict[str, Any]], times: CallTimes, measured: bool
) -> list[dict[str, Any]]:
    """What the tables and the chart show of a run.

    Images may lack rows. Beside fewer steps those count that have the two points of the line around the row's time.

    Args:
        run, rows: what was generated.
        results: of `generation.read`, of one run.
        times: of the kinds of calls.
        measured: take each row's own seconds too, over those of a call of fewer steps.

    Returns:
        Of each row: row, fields, images (how many), whole, cached (calls, mean); distances, of each of METRICS that was
        measured its median, mean and worst; machines, of each its time in unpatched calls and `paired` against fewer
        steps in that time for each metric, nothing where the line does not reach; deepcache, `paired` in PSNR against
        DeepCache with the same interval, for step caching.
    """
    found: dict[str, _Images] = {row.key: {} for row in rows}
    for one in results:
        if one["run"] == run.name and one["key"] in found:
            found[one["key"]][one["image"]] = one
    fewer = [found[row.key] for row in rows if row.kind == FEWER_STEPS and found[row.key]]
    call = _seconds_of_a_call([one for point in fewer for one in point.values()])
    entries = []
    for row in rows:
        own = found[row.key]
        if not own:
            continue
        calls = {kind: statistics.mean(one["calls"].get(kind, 0) for one in own.values()) for kind in _kinds(own)}
        machines: dict[str, dict[str, Any]] = {
            name: {"time": time_of(row, calls, machine)} for name, machine in times.items()
        }
        if measured and call:
            machines[MEASURED] = {"time": statistics.median(one["seconds"] for one in own.values()) / call}
        if row.kind != FEWER_STEPS:
            for machine in machines.values():
                machine |= _against_fewer_steps(own, fewer, machine["time"])
        entries.append(
            {
                "run": run.name, "row": row.name, "kind": row.kind, "fields": row.fields, "images": len(own),
                "whole": sum(count for kind, count in calls.items() if "whole" in kind),
                "cached": sum(count for kind, count in calls.items() if "cached" in kind),
                "distances": _summary(list(own.values())),
                "machines": machines,
                "deepcache": _against_deepcache(row, rows, found),
            }
        )  # fmt: skip
    return entries


def on_common_images(run: Run, rows: Sequence[Row], results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of a run for a chart, whose rows must be of the same images.

    Rows that fewer than half of the images have are left out, then images that lack one of the others.
    """
    keys = {row.key for row in rows}
    own = [one for one in results if one["run"] == run.name and one["key"] in keys]
    images = {key: {one["image"] for one in own if one["key"] == key} for key in keys}
    every = set().union(*images.values())
    shown = {key for key, has in images.items() if has and 2 * len(has) >= len(every)}
    common = every.intersection(*(images[key] for key in shown))
    return [one for one in own if one["key"] in shown and one["image"] in common]


def _summary(own: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    found = {}
    for metric, sign in METRICS.items():
        values = [one[metric] for one in own if one.get(metric) is not None]
        if values:
            worst = min(values) if sign > 0 else max(values)
            found[metric] = {"median": statistics.median(values), "mean": statistics.mean(values), "worst": worst}
    return found


def _against_fewer_steps(own: _Images, line: list[_Images], time: float) -> dict[str, dict[str, Any]]:
    """Of each metric, how near a row is beside the line at a time; nothing where the line does not reach."""
    at = [statistics.mean(sum(one["calls"].values()) for one in point.values()) for point in line]
    around = next(((i, i + 1) for i in range(len(at) - 1) if at[i] <= time <= at[i + 1]), None)
    if around is None:
        return {}
    before, after = (line[i] for i in around)
    found = {}
    for metric, sign in METRICS.items():
        images = [i for i in own if all(one.get(i, {}).get(metric) is not None for one in (own, before, after))]
        if images:
            points = [[(at[k], line[k][i][metric]) for k in around] for i in images]
            others = [at_time(two, time) for two in points]
            found[metric] = paired([own[i][metric] for i in images], [one for one in others if one is not None], sign)
    return found


def _against_deepcache(row: Row, rows: Sequence[Row], found: dict[str, _Images]) -> dict[str, Any] | None:
    interval = row.fields.get("cache_interval", 1)
    theirs = next((other for other in rows if other.kind == "deepcache" and other.interval == interval), None)
    if row.kind != "agentsd" or theirs is None:
        return None
    both = [i for i in found[row.key] if i in found[theirs.key]]
    own, other = ([found[key][i]["psnr"] for i in both] for key in (row.key, theirs.key))
    return {"row": theirs.name, **paired(own, other)} if both else None


def _kinds(own: _Images) -> list[str]:
    return list(dict.fromkeys(kind for one in own.values() for kind in one["calls"]))


def _seconds_of_a_call(own: list[dict[str, Any]]) -> float:
    return statistics.median(one["seconds"] / sum(one["calls"].values()) for one in own) if own else 0.0
