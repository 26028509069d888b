"""count_multiply_adds: the arithmetic of one call of a UNet, whole and cached, counted without running it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from torch.utils.flop_counter import FlopCounterMode

from .unet.layers import UNet
from .unet.skipping import Switch, install_skipping, skippable_forwards


def count_multiply_adds(
    unet: UNet2DConditionModel, latent_height: int, latent_width: int, cache_depth: int | str | None = None
) -> tuple[int | None, int | None]:
    """Multiply–adds of one unpatched call with batch 1, and of what a cached call computes of it.

    They are counted on a twin without weights (the meta device), so they are exact, and take no memory.

    Args:
        unet: the UNet.
        latent_height, latent_width: of the call.
        cache_depth: as in AgentConfig; None where there is no step caching, and the second number is None.

    Returns:
        The two numbers, both None for a kind of UNet whose extra inputs are not known here.
    """
    config = {**unet.config, "encoder_hid_dim_type": None}  # an IP-Adapter's projection is not part of the UNet proper
    with torch.device("meta"), torch.no_grad():
        twin = type(unet).from_config(config)
        inputs = _inputs(twin, latent_height, latent_width)
        try:
            whole = _count(twin, inputs)
        except (RuntimeError, TypeError, ValueError):  # it wants an input of its own kind, as Kandinsky's
            return None, None
        if cache_depth is None:
            return whole, None
        with _cached_calls(twin, inputs, cache_depth):
            return whole, _count(twin, inputs)


def _count(twin: UNet, inputs: dict[str, Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        twin(**inputs)
    return math.ceil(counter.get_total_flops() / 2)


@contextmanager
def _cached_calls(twin: UNet, inputs: dict[str, Any], depth: int | str) -> Iterator[None]:
    switch = Switch()
    install_skipping(twin, switch, depth)
    twin(**inputs)
    switch.set(switch.kept)
    yield
    for forward in skippable_forwards(twin):
        forward.remove()


def _inputs(twin: UNet, height: int, width: int) -> dict[str, Any]:
    """Inputs of one call, on the default device."""
    frames = (1,) if isinstance(twin, UNetMotionModel) else ()
    text_dim = twin.config.cross_attention_dim
    text_dim = max(text_dim) if isinstance(text_dim, (tuple, list)) else text_dim
    inputs: dict[str, Any] = {
        "sample": torch.empty(1, twin.config.in_channels, *frames, height, width),
        "timestep": torch.zeros(()),
        "encoder_hidden_states": torch.empty(1, 77, text_dim),
    }
    if twin.config.addition_embed_type == "text_time":
        # Only the width of text embedding and size numbers together counts, so the refiner's five sizes may be six.
        pooled = twin.config.projection_class_embeddings_input_dim - 6 * twin.config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
    if getattr(twin, "class_embedding", None) is not None:
        vector = twin.config.class_embed_type in ("projection", "simple_projection")
        size = twin.config.projection_class_embeddings_input_dim
        inputs["class_labels"] = torch.empty(1, size) if vector else torch.zeros(1, dtype=torch.long)
    return inputs
