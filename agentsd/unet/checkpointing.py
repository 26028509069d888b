"""Gradient checkpointing: a block that runs again in the backward pass sees its own UNet call and its own patch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .installation import Installation

_FUNCTION = "_gradient_checkpointing_func"
"""Where diffusers' modules keep their checkpointing function."""


class _Checkpoint:
    """Stands before a module's checkpointing function: what runs again sees what the patch knew in its own call.

    By then there may have been later calls, of another phase and with other dsts, and the patch may have been removed.
    """

    def __init__(self, function: Any, patch: Installation):
        self.function = function
        self.patch = patch

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(_Replayed(module, self.patch), *args, **kwargs)


class _Replayed:
    """A part of the UNet with what the patch knew of the call in progress when this was made."""

    def __init__(self, module: Any, patch: Installation):
        self.module = module
        self.patch = patch
        self.call = _snapshot(patch)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.patch.standing():
            before = _snapshot(self.patch)
            _restore(self.patch, self.call)
            try:
                return self.module(*args, **kwargs)
            finally:
                _restore(self.patch, before)


def _snapshot(patch: Installation) -> tuple:
    layers = [(layer.state.parts, layer.state.order, layer.state.plan) for layer in patch.layers]
    return dataclasses.replace(patch.call), layers


def _restore(patch: Installation, snapshot: tuple) -> None:
    call, layers = snapshot
    for field in dataclasses.fields(call):
        setattr(patch.call, field.name, getattr(call, field.name))
    for layer, (parts, order, plan) in zip(patch.layers, layers):
        layer.state.parts, layer.state.order, layer.state.plan = parts, order, plan


def watch_checkpoints(unet: nn.Module, patch: Installation) -> None:
    """Put the wrapper before every checkpointing function of a UNet that has none yet."""
    for module in unet.modules():
        function = vars(module).get(_FUNCTION)
        if function is not None and not isinstance(function, _Checkpoint):
            setattr(module, _FUNCTION, _Checkpoint(function, patch))


def unwatch_checkpoints(unet: nn.Module) -> None:
    """Undo `watch_checkpoints`."""
    for module in unet.modules():
        function = vars(module).get(_FUNCTION)
        if isinstance(function, _Checkpoint):
            setattr(module, _FUNCTION, function.function)
