"""Row: one way to spend less time than the full run, and which of them a chart has. Touches no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from agentsd.config import PRESETS, AgentConfig
from eval.common.fair_schedules import Run
from eval.common.protocol import Scenario

NOTHING_MERGED: dict[str, Any] = {"ratio": 0, "early": 0}
FEWER_STEPS = "fewer steps"
TOMESD_RATIO = 0.4
FEWER = (6, 8, 10, 12, 15, 18, 22)


@dataclass(frozen=True)
class Row:
    """One way to generate all images of a run.

    Attributes:
        name: in print; of one run no two rows have the same.
        steps: that it takes, fewer than the run's where that is what it is.
        kind: "agentsd", "deepcache", "tomesd" or "fewer steps".
        fields: of AgentConfig, for agentsd.
        interval: of DeepCache.
    """

    name: str
    steps: int
    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    interval: int = 1

    @property
    def scenario(self) -> Scenario:
        if self.kind == "agentsd":
            return Scenario("agentsd", AgentConfig(**self.fields))
        if self.kind == "tomesd":
            return Scenario("tomesd", AgentConfig(ratio=TOMESD_RATIO, early=0.0))
        return Scenario("deepcache", interval=self.interval) if self.kind == "deepcache" else Scenario("sd")

    @property
    def key(self) -> str:
        """Equal for rows that generate the same images."""
        return json.dumps([self.kind, self.steps, self.fields, self.interval], sort_keys=True)


def rows_of(run: Run, fewer: Sequence[int], intervals: Sequence[int], leave_out: Sequence[str] = ()) -> list[Row]:
    """The rows of a run: the line to beat, then ours, DeepCache's and ToMeSD's.

    Args:
        run: that all of them are to come near.
        fewer: steps of the unpatched model, the line to beat; those that are not fewer are left out.
        intervals: of our step caching with nothing merged, and of DeepCache.
        leave_out: names of rows.
    """
    rows = [Row(f"{steps} steps", steps, FEWER_STEPS) for steps in sorted(fewer) if steps < run.steps]
    for interval in intervals:
        fields = {**NOTHING_MERGED, "cache_interval": interval}
        rows.append(Row(f"cache {interval}", run.steps, "agentsd", fields))
    rows += [Row(f'preset "{name}"', run.steps, "agentsd", dict(fields)) for name, fields in PRESETS.items()]
    rows += [Row(f"DeepCache {interval}", run.steps, "deepcache", {}, interval) for interval in intervals]
    rows.append(Row("ToMeSD", run.steps, "tomesd"))
    rows = list({row.key: row for row in rows}.values())  # a preset may be one of the intervals; it keeps its name
    return [row for row in rows if row.name not in leave_out]
