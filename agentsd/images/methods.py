"""use_method: make a pipeline generate by Stable Diffusion, ToMeSD or AgentSD; the only import of tomesd."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tomesd
import torch

from ..config import AgentConfig
from ..patch import choose_config, find_unet, get_patch, patched, refuse_tomesd
from ..unet.layers import PatchedLayer, find_layers, why_none

METHODS = {"sd": "Stable Diffusion", "tomesd": "ToMeSD", "agentsd": "AgentSD"}
"""Name on the command line: name in print."""


@contextlib.contextmanager
def use_method(pipe: Any, method: str, config: AgentConfig) -> Iterator[None]:
    """Make a pipeline generate by a method for the length of a `with` block; afterwards it is unpatched.

    Args:
        pipe: an unpatched pipeline with a UNet.
        method: "sd" (nothing changed), "tomesd" (the tomesd package at config.ratio, on the same layers as ours), or
            "agentsd".
        config: settings of the patch.

    Raises:
        ValueError: the pipeline is already patched, the method is unknown, or it would change no layer of this model.
    """
    refuse_patched(pipe)
    eligible = check_method(pipe, method, config)
    unet = find_unet(pipe)
    if method == "agentsd":
        with patched(pipe, config):
            yield
    elif method == "tomesd":
        # ToMeSD's default reaches only undownsampled layers: on SDXL it would silently do nothing.
        max_downsample = max(layer.downsample for layer in eligible)
        tomesd.apply_patch(pipe, ratio=config.ratio, max_downsample=max_downsample, use_rand=config.use_rand)
        # It forks the global random state, so that two identical calls differ; its own generator prevents that.
        unet._tome_info["args"]["generator"] = torch.Generator(unet.device).manual_seed(config.seed)
        try:
            yield
        finally:
            tomesd.remove_patch(pipe)
            del unet._tome_info
    else:
        yield


def config_for(pipe: Any, method: str, config: AgentConfig | None) -> AgentConfig:
    """The settings of a method: those given, or what apply_patch uses where none are given."""
    return choose_config(pipe, config) if method == "agentsd" else config or AgentConfig()


def check_method(pipe: Any, method: str, config: AgentConfig) -> list[PatchedLayer]:
    """The layers that a method changes, as `find_layers` lists them. Raises ValueError as `use_method`."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(METHODS)}")
    unet = find_unet(pipe)
    eligible, skipped = find_layers(unet, config)
    if method != "sd" and not eligible:
        raise ValueError(f"{METHODS[method]} would change no layer of this {type(unet).__name__}: {why_none(skipped)}")
    return eligible


def refuse_patched(pipe: Any) -> None:
    """Raise ValueError where a patch is on the model: it would act under every method, "sd" included."""
    if get_patch(pipe) is not None:
        raise ValueError(
            "this pipeline is already patched by agentsd: call agentsd.remove_patch(pipe) first. generate, compare and "
            "use_method put the patch on and take it off themselves; pass its settings as config"
        )
    refuse_tomesd(find_unet(pipe))
