"""apply_patch, remove_patch, patched: put agent attention into a diffusers UNet and take it out again."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any, TypedDict, TypeVar

from torch import nn
from typing_extensions import Unpack

from .config import AgentConfig
from .trained import choose_settings
from .unet.layers import RESET_ATTN1, UNet, find_other_cache, unwrap_unet, why_none
from .unet.skipping import skipped_parts
from .unet.threads import changes, refuse_change
from .unet.unet_call import NOISE_LEVELS
from .unet.unet_patch import PATCH_ATTRIBUTE, UNetPatch

Model = TypeVar("Model")


class Settings(TypedDict, total=False):
    """The fields of AgentConfig by name, for editors and type checkers."""

    ratio: float
    early: float
    early_ratio: float | None
    agents: str
    late: str
    alpha: float
    broadcast_exponent: float
    agent_ratio: float
    agent_stride: int | tuple[int, int]
    merge_stride: int | tuple[int, int]
    max_agents: int | None
    max_keys: int | None
    match_tile: int | None
    max_downsample: int | str
    cache_interval: int
    cache_order: int | str
    cache_depth: int | str
    use_rand: bool
    seed: int
    merge_crossattn: bool
    merge_mlp: bool
    upcast: bool | None


def apply_patch(
    model: Model, config: AgentConfig | None = None, *, preset: str | None = None, **settings: Unpack[Settings]
) -> Model:
    """Make a Stable Diffusion UNet use agent attention and token merging, in place.

    Args:
        model: a diffusers pipeline with a UNet2DConditionModel as its `unet` (SD 1.x, 2.x, SDXL, with or without
            ControlNet, img2img, inpainting …) or AnimateDiff's UNetMotionModel, or such a UNet itself, also compiled or
            wrapped by DataParallel, DistributedDataParallel, FSDP or peft.
        config: all settings at once; or
        preset: "paper", "fast", "fastest", "large" or "cache": a set of fields (`agentsd.config.PRESET_NOTES`); or
        **settings: fields of AgentConfig by name, `ratio=0.4, early=0.4, …`. They override config or preset.

    A model that was fine-tuned with agents (`load_pipeline` found an agentsd.json in its folder) starts from the
    settings it was trained for in place of the defaults, and a warning says so once; a config or a preset replaces
    them. Where they belong to a LoRA that is no longer at work on the model, they are left out, and a warning says so.

    Returns:
        `model`, patched. Applying again replaces the former patch.

    Raises:
        TypeError: the model has no such UNet, a setting has the wrong type or an unknown name, or there are both config
            and preset.
        ValueError: a setting is out of its range, or the model has ToMeSD's patch or, with step caching, another cache.
        RuntimeError: a call of the UNet is in progress, or another thread is in the middle of a run.
        Nothing is changed where an error is raised.
    """
    unet = find_unet(model)
    config = _choose(unet, config, preset, settings)
    refuse_tomesd(unet)
    if config.cache_interval > 1:
        skipped_parts(unet, config.cache_depth)  # raises where the UNet has not so many
        if (other := find_other_cache(unet)) is not None:
            raise ValueError(
                f"cache_interval={config.cache_interval}: {other} is on this model and caches too: turn it off first, "
                "or use cache_interval=1"
            )
    with changes:
        _remove(unet)
        patch = UNetPatch(model, config)
        patch.install()
    layers, skipped = patch.layers, patch.skipped
    if patch.schedule.noise_levels:
        patch.warnings.once("noise levels", NOISE_LEVELS)
    foreign = sorted({layer.reason for layer in skipped if layer.foreign})
    remedy = f". To patch them too, {RESET_ATTN1}" if foreign else ""
    if not layers:
        what = f"no layer of this {type(unet).__name__} was patched: {why_none(skipped)}"
        warnings.warn(f"agentsd: {what}{remedy}", stacklevel=2)
    elif foreign:
        what = f"{len(layers)} layers were patched, others were left alone: {'; '.join(foreign)}"
        warnings.warn(f"agentsd: {what}{remedy}", stacklevel=2)
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
        RuntimeError: a call of the UNet is in progress, or another thread is in the midst of a run; nothing changes.
    """
    with changes:
        _remove(find_unet(model))
    return model


def new_run(model: Model) -> Model:
    """Tell step caching that the next UNet call begins a run; for loops by hand.

    Pipelines need it not, nor do loops over a scheduler's own `timesteps`. No-op on an unpatched model.

    Args:
        model: what apply_patch takes.

    Returns:
        `model`.

    Raises:
        TypeError: the model has no UNet that could have been patched.
    """
    patch = get_patch(model)
    if patch is not None:
        patch.runs.new_run()
    return model


@contextlib.contextmanager
def patched(
    model: Model, config: AgentConfig | None = None, *, preset: str | None = None, **settings: Unpack[Settings]
) -> Iterator[Model]:
    """`apply_patch` for the length of a `with` block; restores a patch that was there before.

    Other threads may use the model inside the block, but not change its patch. Arguments and errors as `apply_patch`;
    yields `model`.
    """
    unet = find_unet(model)
    with changes:
        before = get_patch(unet)
        apply_patch(model, config, preset=preset, **settings)
        mine = get_patch(unet)
        assert mine is not None  # apply_patch has just put it on
        mine.owner = threading.get_ident()
    try:
        yield model
    finally:
        # Garbage collection closes a block that was never left together with its model: nothing is left to restore.
        if not mine.is_orphan:
            with changes:
                _remove(unet)
                if before is not None:
                    before.install()


def choose_config(
    model: Any, config: AgentConfig | None = None, preset: str | None = None, **settings: Any
) -> AgentConfig:
    """The settings that apply_patch uses for these arguments; a warning says once where they are those of the training.

    Raises:
        TypeError, ValueError: as apply_patch.
    """
    return _choose(find_unet(model), config, preset, settings)


def find_unet(model: Any) -> UNet:
    """The UNet that apply_patch patches in a pipeline or UNet. Raises TypeError as apply_patch does."""
    return unwrap_unet(model)[0]


def get_patch(model: Any) -> UNetPatch | None:
    """The patch on a pipeline or UNet, or None."""
    return getattr(find_unet(model), PATCH_ATTRIBUTE, None)


def refuse_tomesd(unet: nn.Module) -> None:
    """Raise ValueError where ToMeSD is on a UNet."""
    # Not by `_tome_info`, which tomesd.remove_patch leaves behind; the class it swaps in is what merges tokens.
    if any(type(module).__name__ == "ToMeBlock" for module in unet.modules()):
        raise ValueError(
            "this model is already patched by ToMeSD, which would merge its tokens too: call tomesd.remove_patch first"
        )


def _choose(unet: UNet, config: AgentConfig | None, preset: str | None, settings: Any) -> AgentConfig:
    chosen, said = choose_settings(unet, config, preset, **settings)
    if said:
        warnings.warn(f"agentsd: {said}", stacklevel=3)
    return chosen


def _remove(unet: UNet) -> None:
    """Take the patch off, if there is one and nothing is in its midst."""
    patch = get_patch(unet)
    if patch is None:
        refuse_change(unet, lambda frame: False, None)
        return
    patch.refuse_change()
    patch.uninstall()
