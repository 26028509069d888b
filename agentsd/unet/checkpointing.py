"""Gradient checkpointing: a block that runs again in the backward pass sees its own UNet call and its own patch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from .processor import LayerState

_FUNCTION = "_gradient_checkpointing_func"
"""Where diffusers' modules keep their checkpointing function."""


class Patch(Protocol):
    """What is needed of a patch."""

    states: list[LayerState]

    def standing(self) -> AbstractContextManager[None]: ...


class _Checkpoint:
    """Stands before a module's checkpointing function: what runs again sees what the patch knew in its own call.

    By then there may have been later calls, of another phase and with other dsts, and the patch may have been removed.
    """

    def __init__(self, function: Any, patch: Patch):
        self.function = function
        self.patch = patch

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(_Replayed(module, self.patch), *args, **kwargs)


class _Replayed:
    """A part of the UNet with what its layers do in the call in progress when this was made."""

    def __init__(self, module: Any, patch: Patch):
        self.module = module
        self.patch = patch
        self.calls = [state.now for state in patch.states]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.patch.standing():
            before = [state.now for state in self.patch.states]
            _set(self.patch, self.calls)
            try:
                return self.module(*args, **kwargs)
            finally:
                _set(self.patch, before)


def _set(patch: Patch, calls: list) -> None:
    for state, now in zip(patch.states, calls):
        state.now = now


def watch_checkpoints(unet: nn.Module, patch: Patch) -> None:
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
