"""make_pairs: runs whose two phases have settings of their own, what each costs, and which none beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentsd import AgentConfig, Phase
from eval.common.protocol import SD, Scenario

from .costs import Cost, phase_of
from .settings import name_of
from .statistics import Cells, mean_rise, sampler_weights

EARLY = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def make_pairs(
    scenarios: Sequence[Scenario],
    timesteps: Sequence[int],
    cells: Cells,
    sampled: Sequence[int],
    num_train_timesteps: int,
    costs: dict[str, Cost],
) -> list[dict[str, Any]]:
    """Runs with each agent setting in the noisiest fraction `early` and each later setting after it.

    The phase is a function of the timestep alone, so such a run has the losses of one up to a timestep and those of the
    other beyond it. A run costs the mean of its calls.

    Args:
        sampled: timesteps of the sampler that rise and cost are weighted by.
        costs: by name of the scenario, as costs_of.

    Returns:
        Rows with agents and later (names; "sd" is the model's own attention), early, rise, standard_error, time and
        unet (both of a mean call over the unpatched one).
    """
    agents = [one for one in scenarios if one.method == "agentsd" and phase_of(one) is Phase.AGENT]
    later = [SD, *(one for one in scenarios if one.method == "agentsd" and phase_of(one) is Phase.MERGE)]
    weights = sampler_weights(timesteps, sampled)
    rows = []
    for early in EARLY:
        config = AgentConfig(early=early)

        def in_agent_phase(timestep: int, config: AgentConfig = config) -> bool:
            return config.phase_at(timestep, num_train_timesteps) is Phase.AGENT

        share = sum(map(in_agent_phase, sampled)) / len(sampled)
        for first in agents if early else [None]:
            for second in later if early < 1 else [None]:
                names = [name_of(one) if one else "" for one in (first, second)]
                chosen = [names[0] if in_agent_phase(timestep) else names[1] for timestep in timesteps]
                rise = mean_rise([(cells[name, t], cells["sd", t]) for name, t in zip(chosen, timesteps)], weights)
                row: dict[str, Any] = {"agents": names[0] or None, "later": names[1] or None, "early": early}
                row |= {"rise": rise.value, "standard_error": rise.standard_error}
                for field in ("time", "unet"):
                    ends = [getattr(costs[name], field) if name else 0.0 for name in names]
                    row[field] = None if None in ends else share * ends[0] + (1 - share) * ends[1]
                rows.append(row)
    return rows


def unbeaten(pairs: Sequence[dict[str, Any]], step: float = 0.1) -> list[dict[str, Any]]:
    """The runs that no other one beats in both rise and multiply-adds, from the cheapest to the best.

    Args:
        step: a run is left out if its rise is not smaller by this fraction than that of the one before.
    """
    front: list[dict[str, Any]] = []
    known = [row for row in pairs if row["unet"] is not None]
    for row in sorted(known, key=lambda row: (row["unet"], row["rise"])):
        if not front or row["rise"] < front[-1]["rise"] - step * abs(front[-1]["rise"]):
            front.append(row)
    return front
