"""The attention of a classifier's agents on one image, in the form that agentsd.visualize renders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention import AgentCore


@dataclass(frozen=True)
class ClassifierView:
    """What the agents of one layer did with one image.

    `agentsd.visualize.agent_map`, `agents_sheet` and `agent_at` take it like a view of a UNet's layer.

    Attributes:
        layer: module name of the attention.
        grid: (height, width) of the patch tokens.
        agent_tokens: [num_agents] the token in the middle of each agent's pooling cell.
        agent_attention: [num_agents, N] how much each agent reads of each patch token, averaged over heads; a row sums
            to 1, less what the agent reads of a class token.
        query_attention: [N, num_agents] how much each patch token reads of each agent, averaged over heads.
        class_attention: [num_agents] how much the class token reads of each agent; None without class token.
    """

    layer: str
    grid: tuple[int, int]
    agent_tokens: Tensor
    agent_attention: Tensor
    query_attention: Tensor
    class_attention: Tensor | None


@torch.no_grad()
def look_into_classifier(model: nn.Module, image: Tensor, layer: int | str = 0) -> ClassifierView:
    """Run a model on one image and record the agents of one layer (the paper's appendix E shows such maps).

    Args:
        model: with agent attention; its mode (train or eval) is left as it is.
        image: [1, in_chans, H, W], normalized as for the model.
        layer: number among the layers with agent attention, from 0 or from the end if negative; or a module name.

    Returns:
        The view, on the CPU.

    Raises:
        ValueError: no such layer, the model has none, or more than one image.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AgentCore)}
    names = list(layers)
    if not names:
        raise ValueError(f"{type(model).__name__} has no agent attention; create a model of agentsd.vision")
    name = names[layer] if isinstance(layer, int) and -len(names) <= layer < len(names) else str(layer)
    if name not in layers:
        listed = "; ".join(f"{i}: {name}" for i, name in enumerate(names))
        raise ValueError(f"layer={layer!r}: must be a number or name of a layer with agent attention ({listed})")
    if image.ndim != 4 or image.shape[0] != 1:
        raise ValueError(f"image of shape {tuple(image.shape)}: must be one image, [1, channels, height, width]")
    recorded: list[ClassifierView] = []

    def record(module: Any, args: tuple) -> None:
        *tokens, grid = args
        query, key = (module.project(tokens[0]) if len(tokens) == 1 else tokens)[:2]
        recorded.append(_view(name, module, query, key, grid))

    handle = layers[name].register_forward_pre_hook(record)
    try:
        model(image)
    finally:
        handle.remove()
    return recorded[0]


def _view(name: str, module: AgentCore, query: Tensor, key: Tensor, grid: tuple[int, int]) -> ClassifierView:
    aggregation, broadcast = (weights[0].float().mean(dim=0).cpu() for weights in module.weights(query, key, grid))
    skipped = int(module.has_class_token)
    rows, columns = (_cell_middles(side, module.agent_grid) for side in grid)
    return ClassifierView(
        layer=name,
        grid=grid,
        agent_tokens=(rows[:, None] * grid[1] + columns).flatten(),
        agent_attention=aggregation[:, skipped:],
        query_attention=broadcast[skipped:],
        class_attention=broadcast[0] if skipped else None,
    )


def _cell_middles(side: int, cells: int) -> Tensor:
    """[cells] the place in the middle of each cell of adaptive average pooling along one side."""
    number = torch.arange(cells)
    first = number * side // cells
    last = -(-(number + 1) * side // cells) - 1
    return (first + last) // 2
