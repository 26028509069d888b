"""make_scenarios: the methods and ablations whose loss is measured, each at every timestep; touches no model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from agentsd import AgentConfig
from eval.common.protocol import ABLATIONS as PROTOCOL_ABLATIONS
from eval.common.protocol import CONTROLS, SD, BenchError, Scenario

METHODS = ("sd", "tomesd", "agentsd", *CONTROLS)

ABLATIONS: dict[str, tuple[dict[str, Any], ...]] = {
    **{name: PROTOCOL_ABLATIONS[name] for name in ("alpha", "scale", "late", "agents")},
    "agents-from": tuple({"agents": value} for value in ("merge", "grid")),
    "ratio": tuple({"ratio": value} for value in (0.0, 0.2, 0.4, 0.6)),
    "agent-ratio": tuple({"agent_ratio": value} for value in (0.8, 0.9, 0.95)),
    "agent-stride": tuple({"agent_stride": value} for value in (2, 3, 4, 6)),
    "merge-ratio": tuple({"ratio": value} for value in (0.2, 0.4, 0.6)),
}
"""Name on the command line: the fields of AgentConfig that each of its scenarios sets. `late` and `merge-ratio` are
measured in the later phase (early=0), all others in the agent phase (early=1)."""

LATER = ("late", "merge-ratio")
EARLY = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Fractions of early steps with agents that runs are put together for."""


def make_scenarios(methods: Iterable[str], ratios: Sequence[float], ablate: Sequence[str] = ()) -> list[Scenario]:
    """The scenarios, sd first and the controls last.

    Every method is measured at every timestep, also where a run would not use it: agentsd with agents throughout
    (early=1) and without any (early=0). What a run with another `early` costs follows from the two.

    Args:
        methods: from METHODS; the controls are always included.
        ratios: of tomesd and agentsd; the ablations are made at the last one.
        ablate: keys of ABLATIONS, or two of the agent phase with × or x between them for all their combinations.

    Raises:
        BenchError: an unknown name, or settings that are not possible.
    """
    scenarios = [SD]
    for method in methods:
        if method not in METHODS:
            raise BenchError(f"--methods: {method!r} is unknown, use {', '.join(METHODS)}")
        for ratio in ratios:
            if method == "agentsd":
                scenarios += [Scenario(method, _config({"ratio": ratio, "early": early})) for early in (0.0, 1.0)]
            elif method == "tomesd":
                scenarios.append(Scenario(method, _config({"ratio": ratio, "early": 0.0})))
    for name in ablate:
        base = {"ratio": ratios[-1], "early": 0.0 if name in LATER else 1.0}
        scenarios += [Scenario("agentsd", _config({**base, **fields})) for fields in _combinations(name)]
    scenarios += [Scenario(control, _config({"early": 1.0})) for control in CONTROLS]
    return list(dict.fromkeys(scenario for scenario in scenarios if scenario == SD or _acts(scenario)))


def _combinations(name: str) -> list[dict[str, Any]]:
    """The fields of each scenario of an ablation, or of several crossed by ×."""
    parts = [part.strip() for part in re.split("[×*x]", name)]  # no ablation has an x in its name
    for part in parts:
        if part not in ABLATIONS:
            raise BenchError(
                f"--ablate {name!r}: {part!r} is unknown, use {', '.join(ABLATIONS)}, or two with × between"
            )
        if part in LATER and len(parts) > 1:
            raise BenchError(
                f"--ablate {name!r}: {part} is of the later phase; give both with a comma between, as every agent "
                "setting is combined with every later one in the report"
            )
    return [
        {field: value for fields in combined for field, value in fields.items()}
        for combined in itertools.product(*(ABLATIONS[part] for part in parts))
    ]


def name_of(scenario: Scenario) -> str:
    """Short and unique: the protocol's name, and the settings that it leaves out."""
    name = scenario.name
    if scenario.method == "agentsd":
        for field in ("agent_ratio", "agent_stride"):
            if getattr(scenario.config, field) != getattr(AgentConfig, field):
                name += f"-{field.replace('_', '-')}{getattr(scenario.config, field)}"
    return name


def partner_of(scenario: Scenario, scenarios: Iterable[Scenario]) -> Scenario | None:
    """For agents throughout, the scenario of the later phase of the same run; None if it was not measured.

    At ratio 0 that is the unpatched model.
    """
    if scenario.method != "agentsd":
        return None
    config = scenario.settings
    if config.early != 1 or config.late != "merge":
        return None
    if config.ratio == 0:
        return SD
    later = Scenario("agentsd", AgentConfig(ratio=config.ratio, early=0.0))
    return later if later in scenarios else None


def _acts(scenario: Scenario) -> bool:
    """Whether a scenario differs from sd at all."""
    config = scenario.settings
    return config.ratio > 0 or config.early > 0 or config.late == "downsample"


def _config(fields: dict[str, Any]) -> AgentConfig:
    try:
        return replace(AgentConfig(early=0.0), **fields)
    except (ValueError, TypeError) as error:
        raise BenchError(str(error)) from error
