"""Draw the README's figure of the method: what agents are, and which steps use them.

pip install -e ".[eval]" && python apps/method_figure.py --out eval/results/readme/method.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import ConnectionPatch, Rectangle

from agentsd import AgentConfig, Phase
from agentsd.layer_plan import draw_splits, plan_layer

SIDE, STRIDE = 12, 4  # a small grid, so that single tokens can be seen
TOKEN, AGENT, EDGE = "#cfd8e3", "#e07b39", "#ffffff"
MERGE, LATER = "#5b8db8", "#9fb7cc"


def draw_grid(axes: plt.Axes, agents: set[int], title: str) -> None:
    """The token grid with its agents."""
    for token in range(SIDE * SIDE):
        place = (token % SIDE, SIDE - 1 - token // SIDE)
        axes.add_patch(Rectangle(place, 1, 1, facecolor=AGENT if token in agents else TOKEN, edgecolor=EDGE, lw=1.2))
    for i in range(0, SIDE + 1, STRIDE):
        axes.plot([i, i], [0, SIDE], color="#7a8694", lw=1)
        axes.plot([0, SIDE], [i, i], color="#7a8694", lw=1)
    axes.set(xlim=(-0.1, SIDE + 0.1), ylim=(-0.1, SIDE + 0.1), aspect="equal")
    axes.set_title(title, fontsize=11, loc="left")
    axes.axis("off")


def draw_attention(axes: plt.Axes) -> None:
    """Keys and values to the agents, agents to the queries."""
    rows = [i / 13 for i in range(14)]
    agents = [0.2, 0.5, 0.8]
    for y in rows:
        for a in agents:
            axes.add_artist(ConnectionPatch((0, y), (0.5, a), "data", "data", color=AGENT, alpha=0.28, lw=0.9))
            axes.add_artist(ConnectionPatch((0.5, a), (1, y), "data", "data", color=MERGE, alpha=0.32, lw=0.9))
    axes.scatter([0] * 14, rows, s=46, color=TOKEN, edgecolor="#7a8694", zorder=3)
    axes.scatter([1] * 14, rows, s=46, color=TOKEN, edgecolor="#7a8694", zorder=3)
    axes.scatter([0.5] * 3, agents, s=110, color=AGENT, zorder=3)
    for x, text in ((0, "keys,\nvalues"), (0.5, "agents"), (1, "queries")):
        axes.text(x, -0.06, text, ha="center", va="top", fontsize=10)
    axes.text(0.25, 1.05, "aggregate", ha="center", color=AGENT, fontsize=10)
    axes.text(0.75, 1.05, "broadcast", ha="center", color=MERGE, fontsize=10)
    axes.set(xlim=(-0.12, 1.12), ylim=(-0.2, 1.12))
    axes.set_title("… all tokens attend through them …", fontsize=11, loc="left", pad=12)
    axes.axis("off")


def draw_steps(axes: plt.Axes, config: AgentConfig, steps: int = 50) -> None:
    """The steps of a run, the noisiest first, by phase."""
    timesteps = [1000 * (1 - i / steps) - 1 for i in range(steps)]
    phases = [config.phase_at(timestep) for timestep in timesteps]
    for i, phase in enumerate(phases):
        axes.add_patch(Rectangle((i, 0), 0.86, 1, color=AGENT if phase is Phase.AGENT else LATER))
    early = phases.count(Phase.AGENT)
    axes.text(early / 2, 1.35, f"early={config.early:g}: agents", ha="center", fontsize=10, color=AGENT)
    axes.text((early + steps) / 2, 1.35, "later: merged tokens only", ha="center", fontsize=10, color="#4a6a86")
    axes.text(0, -0.35, "pure noise", ha="left", va="top", fontsize=9)
    axes.text(steps, -0.35, "image", ha="right", va="top", fontsize=9)
    axes.set(xlim=(-0.5, steps + 0.5), ylim=(-1.2, 3))
    axes.set_title("… in the early, noisy steps", fontsize=11, loc="left")
    axes.axis("off")


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/method.png"))
    out = parser.parse_args().out
    config = AgentConfig()
    plan = plan_layer(config, Phase.AGENT, (SIDE, SIDE))
    (split,) = draw_splits(plan, config, 981.0, 1, torch.device("cpu"))
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.6), width_ratios=[1, 1.15, 1.5])
    draw_grid(axes[0], set(split.dst_index.tolist()), f"{plan.num_agents} of {plan.num_tokens} tokens are agents …")
    draw_attention(axes[1])
    draw_steps(axes[2], config)
    figure.tight_layout(w_pad=2)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    main()
