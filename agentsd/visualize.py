"""Record what one patched layer does in a run (look_inside, look_through), for merge maps and agent maps."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .config import AgentConfig, Phase
from .images.generate import run_pipeline
from .images.request import Request
from .layer_plan import plan_layer, token_grid
from .maps import LayerView, agent_at, agent_map, agents_sheet, merge_map
from .merging import merge_tokens, merged_position
from .patch import choose_config, find_unet, get_patch, patched
from .unet.layers import PatchedLayer
from .unet.processor import LayerInCall, project_key_value, project_queries
from .unet.unet_patch import UNetPatch

__all__ = [
    "MOST_VIEWS",
    "LayerView",
    "agent_at",
    "agent_map",
    "agents_sheet",
    "look_inside",
    "look_through",
    "merge_map",
]

MOST_VIEWS = 24
"""How many UNet calls `look_through` records; of a longer run it takes so many, evenly spaced."""

# What is kept of the agents' attention, half the memory of float32. Not float16: where one token holds most of the
# weight, the others' fall below its range, and a map shows them on their own scale.
_KEPT = torch.bfloat16

# Logits computed at once. It bounds the memory of the recording (64 MiB in float32) beside what is kept.
_LOGITS_PER_BLOCK = 2**24


def look_inside(
    pipe: Any,
    request: Request,
    config: AgentConfig | None = None,
    layer: int | str = 0,
    call: int = 0,
    *,
    budget: int | None = None,
    **extra: Any,
) -> tuple[Image.Image, LayerView]:
    """Generate an image with the patch and record one layer in one of its UNet calls.

    Args:
        pipe: a text-to-image pipeline, patched or not; afterwards as before.
        request: what to generate.
        config: settings of the patch; None takes what the model was trained for, or the defaults.
        layer: number among the patched layers, or a module name.
        call: number of the UNet call; with the default settings the first ones are in the agent phase.
        budget: most bytes that the agents' attention may take; None for no limit.
        **extra: further arguments of the pipeline call.

    Returns:
        The finished image and the LayerView.

    Raises:
        ValueError: no such layer or call, the layer merged nothing in that call (ratio 0 in the merge phase), or the
            recording would exceed the budget; raised at the first UNet call, before anything is recorded.

    Source: Agent Attention, appendix E, shows such agent maps for classifiers.
    """
    config = choose_config(pipe, config)
    image, views, num_calls = _record(pipe, request, config, layer, lambda _: {call}, budget, **extra)
    if call >= num_calls or call < 0:
        raise ValueError(f"call={call}: this run had {num_calls} UNet calls; choose 0 … {num_calls - 1}")
    view = views.get(call)
    if view is None:
        raise ValueError(
            f"call={call}: layer {layer} merges nothing in this call with these settings, or step caching skips it; "
            "choose an earlier call, a ratio above 0 or cache_interval=1"
        )
    return image, view


def look_through(
    pipe: Any,
    request: Request,
    config: AgentConfig | None = None,
    layer: int | str = 0,
    *,
    budget: int | None = None,
    **extra: Any,
) -> tuple[Image.Image, list[LayerView]]:
    """As look_inside, but record the layer in all UNet calls of the run in which it merges something.

    Of a run with more than MOST_VIEWS timesteps it records so many calls, evenly spaced, the first and the last among
    them. A view of the agent phase holds num_agents · N numbers (256 · 4,096 for SD 1.5 at 512 px, 2 MB; 16 times as
    many at 1024 px), which is what the budget is for.

    Raises:
        ValueError: no such layer, it merges nothing in any call, or the recording would exceed the budget.
    """
    config = choose_config(pipe, config)
    image, views, num_calls = _record(pipe, request, config, layer, _evenly_spaced, budget, **extra)
    if not views:
        raise ValueError(f"layer {layer} merges nothing in any of the {num_calls} UNet calls; choose a ratio above 0")
    return image, list(views.values())


def _evenly_spaced(total: int) -> Collection[int]:
    """At most MOST_VIEWS of the numbers 0 … total − 1, with the first and the last."""
    if total <= MOST_VIEWS:
        return range(total)
    return {round(i * (total - 1) / (MOST_VIEWS - 1)) for i in range(MOST_VIEWS)}


def _record(
    pipe: Any,
    request: Request,
    config: AgentConfig,
    layer: int | str,
    choose: Callable[[int], Collection[int]],
    budget: int | None,
    **extra: Any,
) -> tuple[Image.Image, dict[int, LayerView], int]:
    """(image, views by call, number of UNet calls).

    Args:
        choose: number of timesteps -> numbers of the calls to record. Those in which the layer merges nothing, and
            those that the run does not get to, have no view.
        The others: as look_inside takes them.
    """
    views: dict[int, LayerView] = {}
    num_calls = 0  # of the UNet, which step caching may take past the layer
    with_agents: list[int] = []
    chosen: Collection[int] | None = None
    with patched(pipe, config):
        patch = get_patch(pipe)
        assert patch is not None
        number = _choose_layer(patch, layer)
        patched_layer, state = patch.layers[number], patch.states[number]

        def count(module: Any, args: Any) -> None:
            nonlocal num_calls
            num_calls += 1

        def record(module: Any, args: Any) -> None:
            nonlocal chosen
            call = num_calls - 1
            if chosen is None:  # the timesteps and the size are known from the first call on
                timesteps = _timesteps(pipe)
                chosen = choose(len(timesteps))
                # Some pipelines call the UNet more than once a timestep: of a later call the phase is not known.
                num_agent_calls = sum(
                    call >= len(timesteps) or config.phase_at(timesteps[call], patch.num_train_timesteps) is Phase.AGENT
                    for call in chosen
                )
                assert patch.call is not None  # one is in progress
                grid = token_grid(*patch.call.size(), patched_layer.downsample)
                _check_budget(config, patched_layer.name, grid, num_agent_calls, budget)
            now = state.now
            if now is not None and any(part.action == "agents" for part in now.parts):
                with_agents.append(call)
            if call in chosen:
                view = None if now is None else _view(patch, patched_layer, now, args[0], call)
                if view is not None:
                    views[call] = view

        handles = [
            find_unet(pipe).register_forward_pre_hook(count),
            patched_layer.attn.register_forward_pre_hook(record),
        ]
        try:
            image, _, _ = run_pipeline(pipe, request, **extra)
        finally:
            for handle in handles:
                handle.remove()
    found = {
        call: replace(view, calls_with_agents=tuple(with_agents), num_calls=num_calls) for call, view in views.items()
    }
    return image, found, num_calls


def _timesteps(pipe: Any) -> list[float]:
    """The noise levels of the run in progress, first to last."""
    timesteps = pipe.scheduler.timesteps.tolist()
    return timesteps[: getattr(pipe, "num_timesteps", None)]  # SDXL's denoising_end leaves the last ones out


def _check_budget(
    config: AgentConfig, name: str, grid: tuple[int, int], num_agent_calls: int, budget: int | None
) -> None:
    """Raise ValueError where a layer's agent attention in so many calls would take more bytes than the budget."""
    plan = plan_layer(config, Phase.AGENT, grid)
    if budget is None or plan.action == "none":
        return
    num_agents, num_tokens = plan.num_agents, plan.num_tokens
    needed = num_agent_calls * num_agents * num_tokens * _KEPT.itemsize
    if needed > budget:
        raise ValueError(
            f"{name}: {num_agents:,} agents × {num_tokens:,} tokens in {num_agent_calls} UNet calls would take "
            f"{needed / 1e9:.2f} GB to record, and {budget / 1e9:.2f} GB are allowed; choose a smaller width and "
            "height, a larger agent_ratio and agent_stride, max_agents, or another layer"
        )


def _choose_layer(patch: UNetPatch, layer: int | str) -> int:
    layers = patch.layers
    names = [entry.name for entry in layers]
    if isinstance(layer, str) and layer in names:
        layer = names.index(layer)
    if isinstance(layer, str) or not 0 <= layer < len(layers):
        listed = "; ".join(f"{i}: {name}" for i, name in enumerate(names))
        raise ValueError(f"layer={layer!r}: must be a number or name of a patched layer ({listed})")
    return layer


@torch.no_grad()
def _view(
    patch: UNetPatch, layer: PatchedLayer, now: LayerInCall, hidden_states: Tensor, call: int
) -> LayerView | None:
    # With guidance the last sample of the batch is the one with the prompt.
    part, attn = now.parts[0], layer.attn
    if now.block_input is None or part.action not in ("agents", "grid agents", "merge"):
        return None
    tokens = agents = agent_tokens = None  # tokens: attention's keys
    if part.action == "grid agents":
        assert part.split is not None
        tokens, position = hidden_states, torch.arange(hidden_states.shape[1], device=hidden_states.device)
        agent_tokens = part.split.dst_index.view(-1, part.split.num_dst)[-1].to(hidden_states.device)
        agents = hidden_states[:, agent_tokens]
    else:
        matching, r = part.match(now.block_input), part.num_merged
        position = merged_position(matching, r)[-1]
        if part.action == "agents":
            tokens = merge_tokens(hidden_states, matching, r)
            agents = merge_tokens(hidden_states, matching, part.num_merged_for_agents)
            agent_tokens = matching.tokens[-1, part.num_merged_for_agents :]
    attention = None
    if tokens is not None and agents is not None and agent_tokens is not None:
        key, _ = project_key_value(attn, tokens)
        attention = _weights(project_queries(attn, agents)[-1].float(), key[-1].float(), position)
        agent_tokens = agent_tokens.cpu()
    unet_call = patch.call
    assert unet_call is not None  # it is in progress
    return LayerView(
        layer.name, call, unet_call.timestep, unet_call.phase, now.plan.grid, position.cpu(), agent_tokens, attention
    )


def _weights(agents: Tensor, key: Tensor, position: Tensor) -> Tensor:
    """What each agent aggregates from each token, as LayerView keeps it: [num_agents, N] on the CPU.

    Args:
        agents: [heads, num_agents, head_dim].
        key: [heads, M, head_dim] of the merged tokens.
        position: [N] which of them each token went to.
    """
    group_sizes = torch.bincount(position, minlength=key.shape[1]).clamp_min(1)
    out = torch.empty(agents.shape[1], len(position), dtype=_KEPT)
    rows = max(1, _LOGITS_PER_BLOCK // (key.shape[0] * key.shape[1]))
    for block, kept in zip(agents.split(rows, dim=1), out.split(rows)):
        by_group = (block @ key.mT * key.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=0)
        kept.copy_((by_group / group_sizes).to(_KEPT)[:, position])
    return out
