"""table: what kinds of UNet calls take, and what runs of them come to, as Markdown.

A run's time is arithmetic: how many calls of each kind it makes (counted by the patch itself, on a tiny UNet), times
their medians; a whole run adds what it takes outside the UNet.
"""

from __future__ import annotations

import statistics
from typing import Any

from agentsd.config import AgentConfig, Phase
from agentsd.images.rounds import FEWEST, is_stable
from agentsd.images.unet_calls import plan_of_run
from eval.common.fair_schedules import Run, set_fair_schedule
from eval.common.tables import markdown

from .methods import COLUMNS, METHODS, SDPA, TOMESD, Column, call_name

_KINDS = ("whole, agent phase", "whole, later", "cached, agent phase", "cached, later")


def seconds_of_run(column: Column, run: Run, pipe: Any, median: dict[str, float]) -> tuple[float, int, int]:
    """Seconds of a run's UNet calls by the median of each kind; how many calls are whole; and how many there are."""
    if column.method == TOMESD:
        calls = sum(plan_of_run(pipe.scheduler, None, run.steps).values())
        return calls * median[TOMESD], calls, calls
    settings = {**METHODS[column.method], "cache_interval": column.interval}
    plan = plan_of_run(pipe.scheduler, AgentConfig(**settings), run.steps)
    total = sum(number * median[call_name(column.method, whole, phase)] for (phase, whole), number in plan.items())
    return total, sum(number for (_, whole), number in plan.items() if whole), sum(plan.values())


def table(
    seconds: dict[str, list[float]],
    methods: list[str],
    runs: list[Run],
    pipe: Any,
    memory: dict[str, int],
    outside_steps: int,
) -> list[str]:
    """Markdown tables: the calls; what runs of them come to; memory. Of one round no speed-ups.

    Args:
        seconds: of each round, by `call_name`; SDPA's, ToMeSD's, and those "outside" the UNet.
        methods: names of METHODS.
        runs: schedulers with their steps.
        pipe: whose scheduler is left another one.
        memory: bytes by method, SDPA's too; or nothing.
        outside_steps: steps of the run of which "outside" is what it took outside the UNet.
    """
    compared = len(seconds[SDPA]) >= FEWEST
    median = {key: statistics.median(values) for key, values in seconds.items()}
    base, outside = median[SDPA], median.get("outside")
    of_kinds = [["SDPA", *_cells([base, base], base, False)]]
    for method in methods:
        of_kinds.append([method, *_cells([median[name] for name in _by_column(method)], base, compared)])
    lines = [markdown(["method", *_KINDS], of_kinds), ""]
    unstable = [name for name, values in seconds.items() if compared and not is_stable(values)]
    if unstable:
        lines += [f"Rounds of these differ by more than 15 %: {', '.join(unstable)}.", ""]
    if not compared:
        return [*lines, "One round: no speed-up is given."]
    columns = [column for column in COLUMNS if column.method in methods]
    rows = []
    for run in runs:
        set_fair_schedule(pipe, run.schedule)
        of_calls: list[str] = []
        of_runs: list[str] = []
        for column in columns:
            total, whole, calls = seconds_of_run(column, run, pipe, median)
            said = f" ({whole} of {calls} whole)" if column.interval > 1 else ""
            of_calls.append(f"{calls * base / total:.2f}×{said}")
            if outside is not None:
                of_runs.append(f"{(calls * base + outside) / (total + outside):.2f}×")
        rows.append([f"UNet calls, {run.name}", *of_calls])
        if of_runs:
            rows.append([f"whole run, {run.name}", *of_runs])
    if memory:
        rows.append([f"memory (SDPA: {memory[SDPA] / 1e6:,.0f} MB)",
                     *(f"{memory[column.method] / 1e6:,.0f} MB" for column in columns)])  # fmt: skip
    lines += [markdown(["", *(column.name for column in columns)], rows)]
    if outside is not None:
        lines += ["", f"Outside the UNet a run of {outside_steps} steps takes {outside:.2f} s."]
    return lines


def _cells(seconds: list[float], base: float, compared: bool) -> list[str]:
    said = [f"{one:.2f} s" + (f" ({base / one:.2f}×)" if compared else "") for one in seconds]
    return said + [""] * (len(_KINDS) - len(said))


def operations_table(found: dict[str, int], methods: list[str]) -> list[str]:
    """A Markdown table of the numbers of operations."""
    said = "Tensor operations of a call without torch.compile, about the kernels it would launch on a GPU:"
    rows: list[list[object]] = [["SDPA", found[SDPA], found[SDPA], "", ""]]
    for method in methods:
        counts: list[object] = [found[name] for name in _by_column(method)]
        rows.append([method, *counts, *[""] * (len(_KINDS) - len(counts))])
    return ["", said, "", markdown(["method", *_KINDS], rows)]


def _by_column(method: str) -> list[str]:
    """Names of a method's calls in the order of _KINDS; ToMeSD has whole ones alone, alike in both phases."""
    if method == TOMESD:
        return [TOMESD, TOMESD]
    return [call_name(method, whole, phase) for whole in (True, False) for phase in Phase]
