"""The forecast as a Markdown page and as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from agentsd.config import Phase
from eval.common.tables import markdown

from . import before
from .gpus import FAST_HOST, FORECAST, GPUS, HOSTS, Host
from .networks import STEPS, Shape
from .roofline import EAGER, GRAPH, call_seconds
from .runs import Costs
from .validation import Errors, Prediction

CASES: tuple[tuple[str, Host, str], ...] = (
    ("eager, fast host", HOSTS[0], EAGER),
    ("eager, slow host", HOSTS[1], EAGER),
    ("CUDA graph", FAST_HOST, GRAPH),
)
"""Name, host and mode of the forecast's rows."""

_CACHED_RUN, _ALONE_RUN = "interval 5", "caching alone, 5"


def as_data(costs: dict[Shape, Costs], predictions: list[Prediction], about: dict[str, Any]) -> dict[str, Any]:
    """Everything that the page says, ready for JSON."""
    return {
        **about,
        "validation": [
            {
                "gpu": one.figure.gpu, "shape": str(one.figure.shape), "what": one.figure.what,
                "ratio": one.figure.is_ratio, "measured": one.figure.measured, "predicted": one.predicted,
                "error": one.error, "found_later": one.figure.later, "source": one.figure.source,
            }
            for one in predictions
        ],
        "calls": {
            str(shape): {
                "unpatched": {"operators": of.unpatched.operators, "waits": of.unpatched.waits},
                **{
                    f"{run}: {_kind(kind)}": {
                        "operators": call.operators, "waits": call.waits, "hooks_ms": 1e3 * of.hooks[run][kind],
                        "of_a_run": of.plans[run][kind],
                    }
                    for run, calls in of.calls.items()
                    for kind, call in calls.items()
                },
            }
            for shape, of in costs.items()
        },
        "speed_ups": [
            {"shape": str(shape), "gpu": gpu, "case": case, "unpatched_ms": _milliseconds(of, gpu, host, mode)}
            | {run: round(of.speed_up(run, GPUS[gpu], host, mode), 3) for run in of.calls}
            for shape, of in costs.items()
            for gpu in FORECAST
            for case, host, mode in CASES
        ],
    }  # fmt: skip


def as_page(costs: dict[Shape, Costs], predictions: list[Prediction], about: dict[str, Any]) -> str:
    """The page, eval/results/gpu-forecast.md."""
    ratios = [one for one in predictions if one.figure.is_ratio]
    lines = [
        "# A forecast for GPUs",
        "",
        f"**Forecast, not measured.** {error_sentence(ratios)} To know, run `agentsd tune` on the GPU.",
        "",
        f"`{about['command']}` at commit {about['commit']}; {about['machine']}; {about['versions']}.",
        "",
        "It walks diffusers' real UNets on PyTorch's meta device, which computes nothing, records every operator with "
        "its sizes, and predicts its time from a GPU's data sheet: tiles and waves for products, convolutions and "
        "attention, bytes for the rest, the time of the smallest kernel, and the host's time to issue them. "
        "[The model](../forecast/roofline.py) · [the GPUs](../forecast/gpus.py) · "
        "[the public figures](../forecast/public_figures.py)",
        "",
        f"## UNet calls of {STEPS} PLMS steps over the unpatched model",
        "",
        "Batch of 2 (guidance), float16, ratio 0.4. *Agents* are the defaults without caching; *caching alone* merges "
        "nothing. H100 is uncalibrated. *Slow host*: a server's CPU, 2.5 times slower.",
        "",
    ]
    for shape, of in costs.items():
        lines += [f"### {shape}", "", *_speed_ups(of), ""]
    lines += ["## Where it would be slower than the unpatched model", "", *_slower(costs), ""]
    lines += ["## Before and after", "", *_before_and_after(costs), ""]
    lines += ["## What a call runs", "", *_calls(costs), ""]
    lines += ["## Against public figures", "", *_validation(predictions), ""]
    lines += ["## GPUs and hosts", "", *_gpus(), ""]
    lines += [
        "## What it cannot see",
        "",
        "cuDNN's choice of algorithm, clocks and power limits, the allocator, what Inductor really fuses, memory that "
        "runs out, other programs. Efficiencies of row and element gathers were set after a first look at ToMeSD's "
        "rows; one factor per GPU was fitted to times of unpatched calls, nothing to ratios. The host's time in the "
        "hooks is "
        f"measured on the machine above and taken times {HOSTS[0].relative:g} and {HOSTS[1].relative:g}.",
        "",
    ]
    return "\n".join(lines)


def error_sentence(ratios: Iterable[Prediction]) -> str:
    """How far the model is off on public ratios, in words."""
    ratios = list(ratios)
    errors = Errors.of(ratios)
    said = (
        f"Of {errors.count} public ratios (ToMeSD, DeepCache) it is off by {errors.least:+.0%} to "
        f"{errors.largest:+.0%}, by {errors.median_size:.0%} in the median"
    )
    if later := [one for one in ratios if one.figure.later]:
        held = Errors.of(later)
        said += f"; of the {held.count} found after it was made, by {held.least:+.0%} to {held.largest:+.0%}"
    return said.replace("-", "−") + "."


def _percent(fraction: float) -> str:
    return f"{fraction:+.0%}".replace("-", "−")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table; all but the first column to the right."""
    return markdown(list(header), rows, "lr").splitlines()


def _milliseconds(of: Costs, gpu: str, host: Host, mode: str) -> float:
    return round(1e3 * call_seconds(of.unpatched, GPUS[gpu], host, mode).total, 2)


def _speed_ups(of: Costs) -> list[str]:
    runs = list(of.calls)
    rows = []
    for gpu in FORECAST:
        for case, host, mode in CASES:
            name = gpu if GPUS[gpu].calibrated else f"{gpu} (uncalibrated)"
            cells = [f"{of.speed_up(run, GPUS[gpu], host, mode):.2f}" for run in runs]
            rows.append([f"{name}, {case}", f"{_milliseconds(of, gpu, host, mode):.1f}", *cells])
    whole = [
        f"{sum(count for (_, whole), count in of.plans[run].items() if whole)} of {of.plans[run].total()}"
        for run in runs
    ]
    return table(["", "unpatched, ms", *runs], [["whole calls", "", *whole], *rows])


def _slower(costs: dict[Shape, Costs]) -> list[str]:
    found = [
        f"- {shape}, {gpu}, {case}: "
        + ", ".join(f"{run} {speed_up:.2f}" for run, speed_up in speed_ups.items() if speed_up < 1)
        for shape, of in costs.items()
        for gpu in FORECAST
        for case, host, mode in CASES
        if min((speed_ups := {run: of.speed_up(run, GPUS[gpu], host, mode) for run in of.calls}).values()) < 1
    ]
    return found or ["Nowhere in the tables above."]


def _before_and_after(costs: dict[Shape, Costs]) -> list[str]:
    rows = []
    for shape, of in costs.items():
        for gpu, figures in before.SPEED_UPS.get(shape, {}).items():
            cells = []
            for run in ("agents", "interval 3", "interval 5", "caching alone, 5"):
                if run not in of.calls:
                    return ["Not with these runs."]
                now = f"{of.speed_up(run, GPUS[gpu], FAST_HOST, EAGER):.2f}"
                cells.append(f"{figures[run]:.2f} → {now}" if run in figures else f"→ {now}")
            rows.append([f"{shape}, {gpu}", *cells])
    said = f"Eager, fast host; the same model of commit {before.COMMIT} → of this one."
    return [said, "", *table(["", "agents", "interval 3", "interval 5", "caching alone, 5"], rows)]


def _calls(costs: dict[Shape, Costs]) -> list[str]:
    said = (
        "Operators that a call issues without `torch.compile`, as `eval/common/operations.py` counts them; the host's "
        "time in the patch's hooks (the least of a run's calls, on a machine that others used too); how often it waits "
        "for the device in a call, beside once at the beginning of a run."
    )
    names = {
        "unpatched": "unpatched", "agents": "agent phase", "merge": "later phase", "cached": "cached, agent / later",
        "cached alone": "cached, nothing merged", "hooks": "hooks with caching, ms", "waits": "waits for the device",
    }  # fmt: skip
    shapes = [shape for shape in costs if shape in before.OPERATORS]
    rows = []
    for key, name in names.items():
        cells = [f"{before.OPERATORS[shape][key]} → {_counted(costs[shape])[key]}" for shape in shapes]
        rows.append([name, *cells])
    return [said, "", *table([f"{before.COMMIT} → now", *map(str, shapes)], rows)]


def _counted(of: Costs) -> dict[str, str]:
    agents, cached, alone = of.calls["agents"], of.calls[_CACHED_RUN], of.calls[_ALONE_RUN]
    agent, merge = Phase.AGENT, Phase.MERGE
    both = [cached[phase, False].operators for phase in (agent, merge)]
    return {
        "unpatched": str(of.unpatched.operators),
        "agents": str(agents[agent, True].operators),
        "merge": str(agents[merge, True].operators),
        "cached": " / ".join(map(str, dict.fromkeys(both))),
        "cached alone": str(alone[merge, False].operators),
        "hooks": f"{1e3 * max(of.hooks[_CACHED_RUN].values()):.2f}",
        "waits": str(max(call.waits for call in cached.values())),
    }


def _validation(predictions: list[Prediction]) -> list[str]:
    lines = []
    for title, those, digits in (
        (
            "Ratios over the unpatched model; nothing was fitted to them.",
            [p for p in predictions if p.figure.is_ratio],
            2,
        ),
        (
            "Milliseconds of an unpatched call (a run's time by its steps); one factor per GPU was fitted to those "
            "without a star.",
            [p for p in predictions if not p.figure.is_ratio],
            1,
        ),
    ):
        rows = [
            [
                f"{one.figure.gpu}, {one.figure.shape}: {one.figure.what}{' *' if one.figure.later else ''}",
                f"{one.predicted:.{digits}f}", f"{one.figure.measured:.{digits}f}", _percent(one.error),
                f"[source]({one.figure.source})",
            ]
            for one in those
        ]  # fmt: skip
        lines += [title, "", *table(["", "predicted", "measured", "error", ""], rows), ""]
    return [*lines, "\\* found after the model's constants were set."]


def _gpus() -> list[str]:
    rows = [
        [
            gpu.name, f"{gpu.tensor_tflops:g}", f"{gpu.calibration:.2f}" + ("" if gpu.calibrated else " (assumed)"),
            f"{gpu.gigabytes_per_second:g}", str(gpu.multiprocessors), f"{gpu.cache_megabytes:g}", gpu.source,
        ]
        for gpu in GPUS.values()
    ]  # fmt: skip
    header = ["", "tensor TFLOPS", "factor fitted", "GB/s", "SMs", "L2, MB", "source"]
    hosts = [[h.name, f"{h.operator:g}", f"{h.view:g}", f"{h.module:g}", f"{h.call:g}"] for h in HOSTS]
    return [
        *table(header, rows), "",
        *table(["µs of the host for", "an operator", "a view", "a module", "a step"], hosts),
    ]  # fmt: skip


def _kind(kind: tuple[Phase, bool]) -> str:
    phase, whole = kind
    return f"{'whole' if whole else 'cached'}, {phase.value}"
