"""METHODS: whose UNet calls call_bench times, by name; COLUMNS: the runs that they come to. Nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agentsd.config import PRESETS

TOMESD = "ToMeSD"
TOMESD_RATIO = 0.4

METHODS: dict[str, dict[str, Any]] = {
    TOMESD: {"ratio": TOMESD_RATIO},
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
