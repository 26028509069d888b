"""METHODS: whose UNet calls call_bench times; COLUMNS: the runs that they come to; call_name. Nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agentsd.config import PRESETS, AgentConfig, Phase

SDPA = "sdpa"
TOMESD = "ToMeSD"

METHODS: dict[str, dict[str, Any]] = {
    TOMESD: {"ratio": AgentConfig.ratio},
    "agents": {"cache_interval": 2},
    "cache alone": {"ratio": 0.0, "early": 0.0, "cache_interval": 2},
    "large": {**PRESETS["large"], "cache_interval": 2},
}
"""ToMeSD's ratio, and ours with step caching, so that there are whole and cached calls of each."""


@dataclass(frozen=True)
class Column:
    """What of the timed calls a run is made of.

    Attributes:
        name: in print.
        method: of METHODS.
        interval: of step caching, 1 without.
    """

    name: str
    method: str
    interval: int


COLUMNS = (
    Column("ToMeSD", TOMESD, 1),
    Column("agents", "agents", 1),
    Column('preset "fast"', "agents", 3),
    Column("agents, interval 5", "agents", 5),
    Column('preset "large"', "large", 1),
    Column('preset "fastest"', "large", 5),
    Column('preset "cache"', "cache alone", 3),
    Column("cache alone, interval 5", "cache alone", 5),
)


def call_name(method: str, whole: bool, phase: Phase) -> str:
    """What the seconds of a kind of call stand under: "agents, whole, merge"."""
    return f"{method}, {'whole' if whole else 'cached'}, {phase.value}"
