"""use_method: make a pipeline generate by Stable Diffusion, ToMeSD or AgentSD; the only import of tomesd."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tomesd
import torch

from ..config import AgentConfig
from ..patch import find_unet, patched
from ..unet.layers import find_layers, why_none

METHODS = {"sd": "Stable Diffusion", "tomesd": "ToMeSD", "agentsd": "AgentSD"}
"""Name on the command line: name in print."""


@contextlib.contextmanager
def use_method(pipe: Any, method: str, config: AgentConfig) -> Iterator[None]:
    """Make a pipeline draw by a method for the length of a `with` block; afterwards it is unpatched.

    Args:
        pipe: an unpatched pipeline with a UNet.
        method: "sd" (nothing changed), "tomesd" (the tomesd package at config.ratio, on the same layers as ours), or
            "agentsd".
        config: settings of the patch.

    Raises:
        ValueError: unknown method, or one that would change no layer of this model.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(METHODS)}")
    unet = find_unet(pipe)
    eligible, skipped = find_layers(unet, config)
    if method != "sd" and not eligible:
        raise ValueError(f"{METHODS[method]} would change no layer of this {type(unet).__name__}: {why_none(skipped)}")
    if method == "agentsd":
        with patched(pipe, config):
            yield
    elif method == "tomesd":
        # ToMeSD's default reaches only undownsampled layers: on SDXL it would silently do nothing.
        max_downsample = max(downsample for _, _, downsample in eligible)
        tomesd.apply_patch(pipe, ratio=config.ratio, max_downsample=max_downsample, use_rand=config.use_rand)
        # It forks the global random state, so that two identical calls differ; a generator of its own mends that.
        unet._tome_info["args"]["generator"] = torch.Generator(unet.device).manual_seed(config.seed)
        try:
            yield
        finally:
            tomesd.remove_patch(pipe)
            del unet._tome_info
    else:
        yield
