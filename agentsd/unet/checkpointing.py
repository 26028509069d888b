"""Gradient checkpointing: a block that runs again in the backward pass sees its own UNet call and its own patch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from torch import nn

_FUNCTION = "_gradient_checkpointing_func"
"""Where diffusers' modules keep their checkpointing function."""

Snapshot: TypeAlias = Callable[[], Callable[[], AbstractContextManager[None]]]
"""Called in the forward pass; what it returns brings that call back for a `with` block, whatever came after it."""


class _Checkpoint:
    """Stands before a module's checkpointing function: what runs again sees what the patch knew in its own call.

    By then there may have been later calls, of another phase and with other dsts, and the patch may have been removed.
    """

    def __init__(self, function: Any, snapshot: Snapshot):
        self.function = function
        self.snapshot = snapshot

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        in_this_call = self.snapshot()

        def again(*args: Any, **kwargs: Any) -> Any:
            with in_this_call():
                return module(*args, **kwargs)

        return self.function(again, *args, **kwargs)


def watch_checkpoints(unet: nn.Module, snapshot: Snapshot) -> None:
    """Put the wrapper before every checkpointing function of a UNet that has none yet."""
    for module in unet.modules():
        function = vars(module).get(_FUNCTION)
        if function is not None and not isinstance(function, _Checkpoint):
            setattr(module, _FUNCTION, _Checkpoint(function, snapshot))


def unwatch_checkpoints(unet: nn.Module) -> None:
    """Undo `watch_checkpoints`."""
    for module in unet.modules():
        function = vars(module).get(_FUNCTION)
        if isinstance(function, _Checkpoint):
            setattr(module, _FUNCTION, function.function)
