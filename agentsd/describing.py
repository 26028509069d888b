"""describe: which layers are patched, how many tokens and agents they work with, and what that saves."""

# Not in a file of its own name: importing that would put the module in the place of agentsd.describe.

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from .config import AgentConfig, Phase
from .layer_plan import plan_layer, token_grid
from .multiply_adds import count_multiply_adds
from .patch import find_unet, get_patch
from .report import LastCall, LayerReport, PhaseCost, Report
from .unet.layers import PatchedLayer, class_name, is_ours, own_latent_size
from .unet.outcomes import ACTIVE
from .unet.skipping import skipped_names
from .unet.unet_call import LastCall as LastUNetCall
from .unet.unet_patch import UNetPatch


def describe(model: Any, height: int | None = None, width: int | None = None) -> Report:
    """Report what is patched, what it saves, and what happened in the last UNet call.

    Args:
        model: a pipeline or UNet that `apply_patch` takes, patched or not.
        height, width: image size in pixels; None takes the model's own.

    Returns:
        A Report. Its numbers come from the layers' shapes; nothing is generated or timed.

    Raises:
        TypeError: the model has no UNet of the supported kind, or a size is no integer.
        ValueError: a size is not a positive multiple of the pixels per latent pixel.
    """
    unet = find_unet(model)
    latent_height, latent_width, scale = _latent_size(model, unet, height, width)
    patch = get_patch(model)
    call = patch.last_call if patch else None
    layers = []
    if patch is None:
        for name, module in unet.named_modules():
            if isinstance(module, Attention) and name.endswith("attn1"):
                layers.append(LayerReport(name, "not patched"))
    else:
        for layer in patch.layers:
            grid = token_grid(latent_height, latent_width, layer.downsample)
            outcome = call.outcomes.get(layer.name, "") if call else ""
            report = _layer_report(layer.name, _status(layer, grid, patch.config, call), layer.attn, grid, patch.config)
            layers.append(dataclasses.replace(report, last_call=outcome))
        layers += [LayerReport(layer.name, f"left alone: {layer.reason}") for layer in patch.skipped]
        order = {name: i for i, (name, _) in enumerate(unet.named_modules())}
        layers.sort(key=lambda layer: order[layer.name])
    config = patch.config if patch else None
    depth = config.cache_depth if config and config.cache_interval > 1 else None
    skipped = () if depth is None else skipped_names(unet, depth)
    whole, cached = count_multiply_adds(unet, latent_height, latent_width, depth)
    return Report(
        model=type(model).__name__,
        height=latent_height * scale,
        width=latent_width * scale,
        config=config,
        early_timestep=_early_timestep(patch) if patch else None,
        layers=tuple(
            dataclasses.replace(
                layer,
                self_attention=not _attends_to_text_only(unet, layer.name),
                recomputed=not layer.name.startswith(skipped),
            )
            for layer in layers
        ),
        unet_multiply_adds=whole,
        cached_multiply_adds=cached,
        assumed_timesteps=patch.num_train_timesteps if patch and patch.schedule.refresh().assumed else None,
        last_call=_last_call(patch, scale) if patch else None,
        cache_order=patch.cache_order() if patch else None,
        skips_controlnet=patch is not None and patch.skips_controlnet(),
    )


def _last_call(patch: UNetPatch, scale: int) -> LastCall | None:
    """What the patch noted of its last call, with the pixels per latent pixel."""
    call = patch.last_call
    if call is None:
        return None
    size = (call.height * scale, call.width * scale)
    counts = (call.counts.whole, call.counts.cached) if call.counts else (None, None)
    return LastCall(*size, call.timestep, call.phase, dict(call.notes), call.cached, *counts)


def _early_timestep(patch: UNetPatch) -> float | None:
    """The least noisy timestep of the agent phase, None where no step is in it."""
    if patch.config.early == 0 or patch.schedule.refresh().noise_levels:
        return None
    return patch.config.first_agent_timestep(patch.num_train_timesteps)


def _status(layer: PatchedLayer, grid: tuple[int, int], config: AgentConfig, call: LastUNetCall | None) -> str:
    """What stands on a patched layer, for tokens on a grid, and whether it ran in the last call."""
    if not is_ours(layer):
        return f"replaced by {class_name(layer.attn.processor)}: call apply_patch again"
    if not any(plan_layer(config, phase, grid).num_dst for phase in Phase):
        return f"left alone: its {grid[0]}×{grid[1]} grid is smaller than a cell"
    outcome = call.outcomes.get(layer.name, ACTIVE) if call else ACTIVE
    if call is None or outcome == ACTIVE:
        return "active"
    # Where the settings have nothing to do at that phase and size, the patch is in order none the less.
    planned = plan_layer(config, call.phase, token_grid(call.height, call.width, layer.downsample))
    return "active" if planned.action == "none" else f"not active in the last call: {outcome}"


def _attends_to_text_only(unet: torch.nn.Module, name: str) -> bool:
    """Whether a block's attn1 is cross-attention, as in blocks with only_cross_attention."""
    block = unet.get_submodule(name.rpartition(".")[0])
    return bool(getattr(block, "only_cross_attention", False))


def _latent_size(model: Any, unet: UNet2DConditionModel, height: int | None, width: int | None) -> tuple[int, int, int]:
    scale = getattr(model, "vae_scale_factor", 8)
    default = own_latent_size(unet)
    latent = []
    for name, value, own in (("height", height, default[0]), ("width", width, default[1])):
        if value is None:
            latent.append(own)
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: must be an integer, the image's {name} in pixels")
        if value <= 0 or value % scale:
            raise ValueError(f"{name}={value}: must be a positive multiple of {scale} pixels")
        latent.append(value // scale)
    return latent[0], latent[1], scale


def _layer_report(name: str, status: str, attn: Attention, grid: tuple[int, int], config: AgentConfig) -> LayerReport:
    channels, inner = attn.to_q.in_features, attn.to_q.out_features
    tokens = grid[0] * grid[1]
    before = 4 * tokens * channels * inner + 2 * tokens**2 * inner
    phases = {phase.value: _phase_cost(phase, grid, channels, inner, config, before) for phase in Phase}
    return LayerReport(name, status, grid, tokens, before, phases)


def _phase_cost(
    phase: Phase, grid: tuple[int, int], channels: int, inner: int, config: AgentConfig, unpatched: int
) -> PhaseCost:
    plan = plan_layer(config, phase, grid)
    tokens, left, keys, agents = plan.num_tokens, plan.num_left, plan.num_keys, plan.num_agents
    if plan.action == "none":
        return PhaseCost(tokens, tokens, 0, unpatched)
    if plan.action == "downsample":
        return PhaseCost(left, keys, 0, 2 * (left + keys) * channels * inner + 2 * left * keys * inner)
    attention = 4 * left * agents * inner + (left * inner if config.alpha else 0)
    if plan.action == "grid agents":  # nothing is matched, and the agents' projections are among the queries'
        return PhaseCost(left, keys, agents, 4 * left * channels * inner + attention)
    matching = plan.num_src * plan.num_dst * channels * math.prod(plan.tile or grid) // tokens
    projections = 4 * left * channels * inner
    if plan.action == "merge":
        return PhaseCost(left, keys, 0, matching + projections + 2 * left * keys * inner)
    return PhaseCost(left, keys, agents, matching + projections + agents * channels * inner + attention)
