"""write_report: results.json, results.csv, results.md and the chart, from the losses of all cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from agentsd import Phase
from agentsd.files import write_atomically
from eval.common.environment import environment_line
from eval.common.protocol import Scenario
from eval.common.tables import as_csv, markdown, number, write_json

from .chart import cost_chart
from .costs import SIZE, Cost
from .pairs import make_pairs, unbeaten
from .settings import EARLY, name_of, partner_of
from .statistics import Cells, mean_rise, rise_of, sampler_weights

_TIMESTEPS_A_TABLE = 9
_WIDEST_GAP = 0.1  # of the schedule, from a step of a run to the nearest measured timestep
_FIELDS = ("ratio", "early", "late", "alpha", "broadcast_exponent", "agent_ratio", "agent_stride", "max_agents")


def write_report(
    out: Path,
    about: dict[str, Any],
    scenarios: Sequence[Scenario],
    timesteps: Sequence[int],
    cells: Cells,
    costs: dict[str, Cost],
) -> str:
    """Write all files of the report; returns results.md's text.

    Args:
        about: command, model, images, seed, sampled (the timesteps of a sampler),
            num_train_timesteps and environment.
        costs: of each scenario, by name.
    """
    rows = make_rows(scenarios, timesteps, cells)
    sampled = (about["sampled"], about["num_train_timesteps"])
    runs = make_runs(scenarios, timesteps, cells, *sampled)
    pairs = make_pairs(scenarios, timesteps, cells, *sampled, costs)
    found = {"costs": {name: asdict(cost) for name, cost in costs.items()}, "unbeaten": unbeaten(pairs, 0)}
    write_json(out / "results.json", {"about": about, "rows": rows, "runs": runs, **found})
    write_atomically(out / "results.csv", as_csv(rows, about["environment"]))
    footer = environment_line(about["environment"])
    title = f"What agent attention costs, by noise level: {about['model']}, {about['images']} images"
    charted = cost_chart(rows, out / "cost.png", title, footer)
    text = as_markdown(about, rows, runs, timesteps, costs, pairs) + ("\n![cost](cost.png)\n" if charted else "")
    write_atomically(out / "results.md", text)
    return text


def make_rows(scenarios: Sequence[Scenario], timesteps: Sequence[int], cells: Cells) -> list[dict[str, Any]]:
    """One row per scenario and timestep: settings, loss, rise (0.1 for 10 %) and its standard error."""
    rows = []
    for scenario in scenarios:
        config = asdict(scenario.config) if scenario.config is not None else {}
        used = {
            "agentsd": _FIELDS if config.get("early") else ("ratio", "early", "late", "merge_stride"),
            "tomesd": ("ratio",),
        }.get(scenario.method, ("early",) if config else ())
        for timestep in timesteps:
            losses = cells[name_of(scenario), timestep]
            rise = rise_of(losses, cells["sd", timestep])
            rows.append(
                {
                    "scenario": name_of(scenario),
                    "method": scenario.method,
                    **dict.fromkeys((*_FIELDS, "merge_stride")),
                    **{field: config[field] for field in used},
                    "timestep": timestep,
                    "images": len(losses),
                    "loss": float(losses.mean()),
                    "rise": rise.value,
                    "standard_error": rise.standard_error,
                }
            )
    return rows


def make_runs(
    scenarios: Sequence[Scenario],
    timesteps: Sequence[int],
    cells: Cells,
    sampled: Sequence[int],
    num_train_timesteps: int = 1000,
) -> list[dict[str, Any]]:
    """The mean rise over a sampler's timesteps of each scenario.

    For agents throughout, also for runs with agents in the noisiest fraction `early` alone and the same ratio's merging
    later: the phase is a function of the timestep, so such a run has the losses of one up to a timestep and those of
    the other beyond it.
    """
    weights = sampler_weights(timesteps, sampled)
    runs = []

    def add(scenario: Scenario, early: float | None, names: Sequence[str]) -> None:
        pairs = [(cells[name, timestep], cells["sd", timestep]) for name, timestep in zip(names, timesteps)]
        rise = mean_rise(pairs, weights)
        row = {"scenario": name_of(scenario), "method": scenario.method, "early": early}
        runs.append({**row, "rise": rise.value, "standard_error": rise.standard_error})

    for scenario in scenarios:
        own, later = name_of(scenario), partner_of(scenario, scenarios)
        if later is None:
            add(scenario, scenario.settings.early if scenario.method == "agentsd" else None, [own] * len(timesteps))
            continue
        for early in EARLY:
            config = replace(scenario.settings, early=early)
            # The cost at a timestep stands for all timesteps around it, as the weights do.
            names = [
                own if config.phase_at(timestep, num_train_timesteps) is Phase.AGENT else name_of(later)
                for timestep in timesteps
            ]
            add(scenario, early, names)
    return runs


def as_markdown(
    about: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    runs: Sequence[dict[str, Any]],
    timesteps: Sequence[int],
    costs: dict[str, Cost],
    pairs: Sequence[dict[str, Any]],
) -> str:
    """The report as text; no table has more than ten columns."""
    parts = [
        f"# Denoising loss of {about['model']}",
        f"`{about['command']}`",
        environment_line(about["environment"]),
        f"Rise of the loss E‖ε̂ − ε‖² over the unpatched model in percent, ± its standard error, on {about['images']} "
        "images that it was not trained on; the same images and noise for all. At every timestep also where a run "
        "would not use the method: early1 has agents throughout, early0 none. Large timesteps are noisy; a run begins "
        "there.",
    ]
    names = list(dict.fromkeys(row["scenario"] for row in rows))
    found = {(row["scenario"], row["timestep"]): row for row in rows}
    for start in range(0, len(timesteps), _TIMESTEPS_A_TABLE):
        shown = timesteps[start : start + _TIMESTEPS_A_TABLE]
        body = [[name, *(_percent(found[name, timestep]) for timestep in shown)] for name in names]
        body.insert(0, ["loss of sd", *(f"{found['sd', timestep]['loss']:.4f}" for timestep in shown)])
        parts.append(markdown(["timestep", *map(str, shown)], body, "lr"))
    parts.append(
        "Mean over a sampler's timesteps, by the fraction of early steps that use agents; a setting that has one "
        "value everywhere stands at its own:"
    )
    if (widest := _widest_gap(timesteps, about["sampled"])) > _WIDEST_GAP * about["num_train_timesteps"]:
        parts.append(
            f"**These timesteps do not cover a run**: some of its steps lie {widest:g} from the nearest measured one, "
            "whose rise stands for theirs. For a mean over a run give --timesteps all over it."
        )
    by_name: dict[str, dict[float | None, dict[str, Any]]] = {}
    for row in runs:
        by_name.setdefault(row["scenario"], {})[row["early"]] = row
    body = [
        [name, *(_percent(own[early]) if early in own else "" for early in (None, *EARLY))]
        for name, own in by_name.items()
    ]
    parts.append(markdown(["early", "any", *(f"{early:g}" for early in EARLY)], body, "lr"))
    parts.append(
        "What a UNet call costs: its time over the unpatched call, on this machine and this network (median of the "
        "rounds ± half the distance of their quartiles), and the multiply-adds of Stable Diffusion 1.5 at "
        f"{SIZE} px, of the patched self-attention (one image) and of the whole UNet over the unpatched one:"
    )
    body = [
        [name, _timed(cost), _number(cost.multiply_adds and cost.multiply_adds / 1e9, 1), _number(cost.unet, 3)]
        for name, cost in costs.items()
    ]
    parts.append(markdown(["a call", "time", "attention, 10⁹", "UNet"], body, "lr"))
    if len(front := unbeaten(pairs)) > 1:
        parts.append(
            "Each of these runs has the least rise of all that need as few multiply-adds of Stable Diffusion 1.5's "
            f"UNet, out of {len(pairs)}: every setting of the agent phase with every later one and early fraction. Of "
            "runs whose rises differ by less than a tenth the cheapest is shown."
        )
        body = [
            [f"{row['early']:g}", row["agents"] or "", row["later"] or "", _percent(row), _number(row["unet"], 3)]
            for row in front
        ]
        parts.append(markdown(["early", "agent phase", "later phase", "rise", "UNet"], body, "lr"))
    return "\n\n".join(parts) + "\n"


def _widest_gap(measured: Sequence[int], sampled: Sequence[int]) -> int:
    return max(min(abs(one - timestep) for one in measured) for timestep in sampled)


def _timed(cost: Cost) -> str:
    return "" if cost.time is None else f"{cost.time:.2f} ± {cost.spread:.2f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(row: dict[str, Any]) -> str:
    rise, error = row["rise"], row["standard_error"]
    return "0" if rise == 0 and error == 0 else f"{number(100 * rise, '{:+.1f}')} ± {100 * error:.1f}"
