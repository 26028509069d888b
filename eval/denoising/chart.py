"""cost_chart: what each method costs by noise level, as a chart."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentsd import AgentConfig
from agentsd.files import write_atomically

_COLOURS = {
    "merging": "#e08214", "agents": "#2166ac", "agents only": "#67a9cf", "downsampled": "#4d9221",
    "mean-value": "#b2182b", "no-attention": "#67001f",
}  # fmt: skip
_LEAST = 0.1  # percent: where the logarithmic axis begins


def cost_chart(rows: Sequence[dict[str, Any]], path: Path, title: str, footer: str) -> bool:
    """The rise of the loss in percent by timestep, of the main settings and the controls.

    Ablations and smaller ratios are left to the tables. Returns whether there is a chart: not without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    kinds: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: abs((row["ratio"] or 0) - AgentConfig.ratio)):
        # Of several ratios the one nearest to the default: lines of one colour could not be told apart.
        if (key := _label(row)) is not None and kinds.setdefault(*key) == key[1]:
            lines.setdefault(key, []).append(row)
    if not lines:
        return False
    figure, axes = pyplot.subplots(figsize=(7.5, 4.6))
    for (kind, label), own in lines.items():
        own = sorted(own, key=lambda row: row["timestep"])
        heights = [max(_LEAST, 100 * row["rise"]) for row in own]
        errors = [196 * row["standard_error"] for row in own]
        errors_below = [min(error, height - 0.99 * _LEAST) for error, height in zip(errors, heights)]
        style = "--" if kind in ("mean-value", "no-attention") else "-"
        axes.errorbar(
            [row["timestep"] for row in own], heights, (errors_below, errors), fmt=f"o{style}", markersize=3,
            color=_COLOURS[kind], label=label, capsize=2, linewidth=1.5,
        )  # fmt: skip
    first = AgentConfig().first_agent_timestep()
    axes.axvspan(first, 1000, color="#2166ac", alpha=0.08, linewidth=0)
    axes.text(
        first + 8, 0.97, "agents by default (early = 0.4)", transform=axes.get_xaxis_transform(), va="top", size=8
    )
    axes.set(yscale="log", xlim=(0, 1000), xlabel="timestep (0: no noise; 1000: noise alone, where a run begins)")
    axes.set_ylim(bottom=_LEAST)
    axes.set_ylabel("rise of the loss over full attention")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"+{value:g} %"))
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.canvas.draw()
    bottom = figure.get_tightbbox().y0 / figure.get_figheight()
    figure.text(0.01, bottom, "\n".join(textwrap.wrap(footer, 150)), fontsize=5, color="#666666", va="top")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130, bbox_inches="tight"))
    pyplot.close(figure)
    return True


def _label(row: dict[str, Any]) -> tuple[str, str] | None:
    """(kind, label) of a row that is on the chart, else None."""
    method, ratio = row["method"], row["ratio"]
    if method == "mean-value":
        return method, "control: mean value"
    if method == "no-attention":
        return method, "control: no attention"
    if method != "agentsd":
        return None
    if row["early"] == 0:
        if row["late"] == "downsample" and row["merge_stride"] == 2:
            return "downsampled", "downsampled keys"
        return ("merging", f"merging, ratio {ratio:g}") if row["late"] == "merge" else None
    if all(row[field] == getattr(AgentConfig, field) for field in ("alpha", "broadcast_exponent", "agent_ratio")) and (
        row["agent_stride"] == AgentConfig.agent_stride and row["max_agents"] is None
    ):
        return ("agents", f"agents, ratio {ratio:g}") if ratio else ("agents only", "agents, no merging")
    return None
