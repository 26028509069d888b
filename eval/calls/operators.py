"""operator_table: how many operators each kind of UNet call runs, counted on the meta device.

The networks and the counting are those of the forecast for GPUs: fused attention is one operator, views and empty
tensors are none, and what runs on the host alone is not counted.
"""

from __future__ import annotations

from typing import Any

from agentsd.config import Phase
from eval.common.models import ARCHITECTURES
from eval.common.protocol import BenchError
from eval.forecast.networks import Network, Shape

CALLS: dict[str, tuple[dict[str, Any], Phase, bool]] = {
    "agent phase": ({}, Phase.AGENT, True),
    "agent phase, agents from a grid": ({"agents": "grid"}, Phase.AGENT, True),
    "later, merging": ({}, Phase.MERGE, True),
    "cached, agent phase": ({"cache_interval": 2}, Phase.AGENT, False),
    "cached, later": ({"cache_interval": 2}, Phase.MERGE, False),
    "cached, nothing merged": ({"cache_interval": 2, "ratio": 0.0, "early": 0.0}, Phase.MERGE, False),
}
"""Kind of call: settings, phase, and whether the call is whole."""


def count_operators(network: Network) -> dict[str, int]:
    """Operators of an unpatched call and of every kind of CALLS, by name."""
    found = {"unpatched": network.unpatched().operators}
    traced: dict[str, Any] = {}
    for name, (settings, phase, whole) in CALLS.items():
        if (key := str(settings)) not in traced:
            traced[key] = network.with_agentsd(settings)
        found[name] = traced[key][phase, whole].operators
    return found


def operator_table(shapes: list[str]) -> list[str]:
    """A Markdown table of the operators for shapes like "sd15:512"; raises BenchError for others."""
    networks = [Network(_shape(shape)) for shape in shapes]
    counts = [count_operators(network) for network in networks]
    lines = ["| operators of a UNet call | " + " | ".join(str(network.shape) for network in networks) + " |"]
    lines.append("|---|" + "---:|" * len(networks))
    lines += [f"| {name} | " + " | ".join(f"{one[name]:,}" for one in counts) + " |" for name in counts[0]]
    return lines


def _shape(text: str) -> Shape:
    architecture, _, size = text.partition(":")
    if architecture not in ARCHITECTURES or not size.isdigit() or int(size) < 64 or int(size) % 64:
        raise BenchError(
            f"--shapes {text!r}: must be one of {', '.join(ARCHITECTURES)}, a colon and a size in pixels that 64 "
            "divides, as in sd15:512"
        )
    return Shape(architecture, int(size))
