"""apply_patch, remove_patch, patched: put agent attention into a diffusers UNet and take it out again."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from .config import FIELD_NAMES, AgentConfig
from .unet.call import NOISE_LEVELS
from .unet.installation import PATCH_ATTRIBUTE, Installation
from .unet.layers import NOT_SOFTMAX, RESET_ATTN1, UNet, find_layers, unwrap_unet, why_none
from .unet.schedule import Schedule

Model = TypeVar("Model")


def apply_patch(model: Model, config: AgentConfig | None = None, **settings: Any) -> Model:
    """Make a Stable Diffusion UNet use agent attention and token merging, in place.

    Args:
        model: a diffusers pipeline with a UNet2DConditionModel as its `unet` (SD 1.x, 2.x, SDXL, with or without
            ControlNet, img2img, inpainting …) or AnimateDiff's UNetMotionModel, or such a UNet itself, also compiled or
            wrapped by DataParallel, DistributedDataParallel, FSDP or peft.
        config: all settings at once; or
        **settings: fields of AgentConfig by name, `ratio=0.4, early=0.4, …`. Both together: the fields override.

    Returns:
        `model`, patched. Applying again replaces the former patch.

    Raises:
        TypeError: the model has no such UNet, or a setting has the wrong type or an unknown name.
        ValueError: a setting is out of its range, or ToMeSD's patch is on the model.
        Nothing is changed where an error is raised.
    """
    config = _settings_to_config(config, settings)
    unet, outer = unwrap_unet(model)
    _refuse_tomesd(unet)
    schedule = Schedule(model)
    if schedule.noise_levels:
        warnings.warn(NOISE_LEVELS, stacklevel=2)

    remove_patch(unet)
    eligible, skipped = find_layers(unet, config)
    foreign = sorted({reason for _, reason in skipped if reason.endswith(NOT_SOFTMAX)})
    remedy = f". To patch them too, {RESET_ATTN1}" if foreign else ""
    if not eligible:
        what = f"no layer of this {type(unet).__name__} was patched: {why_none(skipped)}"
        warnings.warn(f"agentsd: {what}{remedy}", stacklevel=2)
    elif foreign:
        what = f"{len(eligible)} layers were patched, others were left alone: {'; '.join(foreign)}"
        warnings.warn(f"agentsd: {what}{remedy}", stacklevel=2)
    patch = Installation(unet, outer, config, schedule, eligible, skipped)
    if schedule.noise_levels:
        patch.mark_warned("noise levels")
    patch.install()
    return model


def remove_patch(model: Model) -> Model:
    """Undo `apply_patch`: restores the original processors and leaves nothing of ours behind.

    A processor that someone set after the patch stays. No-op on an unpatched model.

    Args:
        model: what apply_patch takes.

    Returns:
        `model`.

    Raises:
        TypeError: the model has no UNet that could have been patched.
    """
    patch = get_patch(model)
    if patch is not None:
        patch.uninstall()
    return model


@contextlib.contextmanager
def patched(model: Model, config: AgentConfig | None = None, **settings: Any) -> Iterator[Model]:
    """`apply_patch` for the length of a `with` block; restores a patch that was there before.

    Arguments and errors as `apply_patch`; yields `model`.
    """
    before = get_patch(model)
    apply_patch(model, config, **settings)
    try:
        yield model
    finally:
        remove_patch(model)
        if before is not None:
            before.install()


def find_unet(model: Any) -> UNet:
    """The UNet that apply_patch patches in a pipeline or UNet. Raises TypeError as apply_patch does."""
    return unwrap_unet(model)[0]


def get_patch(model: Any) -> Installation | None:
    """The patch on a pipeline or UNet, or None."""
    return getattr(find_unet(model), PATCH_ATTRIBUTE, None)


def _settings_to_config(config: AgentConfig | None, settings: dict[str, Any]) -> AgentConfig:
    unknown = sorted(set(settings) - set(FIELD_NAMES))
    if unknown:
        raise TypeError(f"unknown setting {', '.join(unknown)}; the settings are {', '.join(FIELD_NAMES)}")
    if config is None:
        return AgentConfig(**settings)
    if not isinstance(config, AgentConfig):
        raise TypeError(f"config={config!r}: must be an AgentConfig; single settings go by name, as in ratio=0.4")
    return dataclasses.replace(config, **settings)


def _refuse_tomesd(unet: nn.Module) -> None:
    # Not by `_tome_info`, which tomesd.remove_patch leaves behind; the class it swaps in is what merges tokens.
    if any(type(module).__name__ == "ToMeBlock" for module in unet.modules()):
        raise ValueError("ToMeSD's patch on this model would merge its tokens twice: call tomesd.remove_patch first")
