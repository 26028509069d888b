"""The text of the node "AgentSD report": layers, tokens, agents and phases of the last run."""

from __future__ import annotations

import dataclasses

from agentsd.config import AgentConfig, Phase
from agentsd.layer_plan import LayerPlan

from .run import Run
from .wrapper import AgentWrapper


def as_text(wrapper: AgentWrapper) -> str:
    """What the last run of a patched model did, a few lines."""
    lines = ["AgentSD, settings: " + _settings(wrapper.config)]
    run = wrapper.run
    if run is None:
        return "\n".join([*lines, "no run yet: connect the sampler's output to `samples` of this node"])
    sizes = ", ".join(f"{width * 8}×{height * 8} px ({count})" for (height, width), count in sorted(run.sizes.items()))
    counts = run.counts()
    lines.append(f"last run: {counts}; sizes: {sizes}" if sizes else f"last run: {counts}")
    if run.passed_by:
        lines.append(f"{run.passed_by} steps never called the model's apply_model, so that AgentSD had no part in them")
    if not run.whole:
        return "\n".join([*lines, *(f"warning: {text}" for text in run.told)])
    lines += _active(run)
    lines += _unpatched(run)
    return "\n".join([*lines, *(f"warning: {text}" for text in run.told)])


def _settings(config: AgentConfig) -> str:
    """ratio and early, and what else is not at its default."""
    changed = [
        field.name
        for field in dataclasses.fields(config)
        if field.name in ("ratio", "early") or getattr(config, field.name) != field.default
    ]
    return ", ".join(f"{name}={getattr(config, name)}" for name in changed)


def _active(run: Run) -> list[str]:
    """One line for each plan, with the number of layers that followed it."""
    layers: dict[tuple[Phase, LayerPlan], int] = {}
    for plans in run.plans.values():
        for key in plans:
            layers[key] = layers.get(key, 0) + 1
    if not layers:
        return ["no layer was patched"]
    in_order = sorted(layers.items(), key=lambda item: (item[0][0] is not Phase.AGENT, item[0][1].grid))
    return [f"{phase.value} phase: {count} layers, {_describe(plan)}" for (phase, plan), count in in_order]


def _describe(plan: LayerPlan) -> str:
    text = f"{plan.grid[0]}×{plan.grid[1]} = {plan.num_tokens} tokens: {plan.num_left} queries, {plan.num_keys} keys"
    return text + (f", {plan.num_agents} agents" if plan.num_agents else "")


def _unpatched(run: Run) -> list[str]:
    """One line for each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in run.reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"unpatched: {len(group)} layers ({group[0]} …): {reason}" for reason, group in names.items()]
