"""How near each row is to the full run's images, beside fewer steps that take the same time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from .call_times import CallTimes, time_of
from .rows import FEWER_STEPS, Row, Run

MEASURED = "measured"


def at_time(line: Sequence[tuple[float, float]], time: float) -> float | None:
    """The line's PSNR at a time: straight in the logarithm of the time between two of its points.

    Args:
        line: (time, PSNR) of each point, times rising.
        time: in the same unit.

    Returns:
        None where the line does not reach so far.
    """
    for (before, low), (after, high) in pairwise(line):
        if before <= time <= after:
            return low + (high - low) * math.log(time / before) / math.log(after / before)
    return None


def compare(
    run: Run, rows: Sequence[Row], results: Iterable[dict[str, Any]], times: CallTimes, measured: bool
) -> list[dict[str, Any]]:
    """What the tables and the chart show of a run.

    Only images that all rows have are counted, so that rows are of the same images.

    Args:
        run, rows: what was generated.
        results: of `generation.read`, of one run.
        times: of the kinds of calls.
        measured: take each row's own seconds too, over those of a call of fewer steps.

    Returns:
        Of each row: row, fields, images, whole, cached (calls, mean), psnr_median, psnr_mean, psnr_worst, ssim_mean;
        and of each machine "MACHINE": time, in unpatched calls; "MACHINE, fewer steps": the median PSNR of fewer steps
        at that time; "MACHINE, nearer": the median over images of the difference, and "MACHINE, nearer, worst". None
        where the line does not reach.
    """
    by_row: dict[str, dict[int, dict[str, Any]]] = {row.key: {} for row in rows}
    for one in results:
        if one["run"] == run.name and one["key"] in by_row:
            by_row[one["key"]][one["image"]] = one
    rows = [row for row in rows if by_row[row.key]]
    images = sorted(set.intersection(*(set(by_row[row.key]) for row in rows))) if rows else []
    if not images:
        return []
    fewer = [row for row in rows if row.kind == FEWER_STEPS]
    call = _seconds_of_a_call(by_row, fewer, images)
    found = []
    for row in rows:
        own = [by_row[row.key][image] for image in images]
        psnrs = [one["psnr"] for one in own]
        calls = {kind: statistics.mean(one["calls"].get(kind, 0) for one in own) for kind in _kinds(own)}
        entry: dict[str, Any] = {
            "run": run.name, "row": row.name, "kind": row.kind, "fields": row.fields, "images": len(images),
            "whole": sum(count for kind, count in calls.items() if "whole" in kind),
            "cached": sum(count for kind, count in calls.items() if "cached" in kind),
            "psnr_median": statistics.median(psnrs), "psnr_mean": statistics.mean(psnrs), "psnr_worst": min(psnrs),
            "ssim_mean": statistics.mean(one["ssim"] for one in own),
        }  # fmt: skip
        machines = {name: time_of(row, calls, machine) for name, machine in times.items()}
        if measured and call:
            machines[MEASURED] = statistics.median(one["seconds"] for one in own) / call
        for name, time in machines.items():
            entry[name] = time
            if row.kind == FEWER_STEPS:
                continue
            lines = [
                [(sum(by_row[one.key][i]["calls"].values()), by_row[one.key][i]["psnr"]) for one in fewer]
                for i in images
            ]
            there = [at_time(line, time) for line in lines]
            reached = [value for value in there if value is not None]
            full = len(reached) == len(images)
            nearer = [psnr - value for psnr, value in zip(psnrs, reached)] if full else []
            entry[f"{name}, fewer steps"] = statistics.median(reached) if full else None
            entry[f"{name}, nearer"] = statistics.median(nearer) if full else None
            entry[f"{name}, nearer, worst"] = min(nearer) if full else None
        found.append(entry)
    return found


def _kinds(own: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(kind for one in own for kind in one["calls"]))


def _seconds_of_a_call(by_row: dict[str, dict[int, dict[str, Any]]], fewer: list[Row], images: list[int]) -> float:
    own = [by_row[row.key][image] for row in fewer for image in images]
    return statistics.median(one["seconds"] / sum(one["calls"].values()) for one in own) if own else 0.0
