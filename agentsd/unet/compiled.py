"""Compiled UNets: the phase is chosen before the graph is entered, as no graph can read the timestep on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .call import UNetHook
from .inputs import sample_and_timestep
from .layers import UNet
from .weak_link import WeakLink

if TYPE_CHECKING:
    from .installation import Installation


class _CompiledEntry:
    """Stands before a UNet's compiled call: prepares the call outside the graph, then enters it."""

    def __init__(self, compiled: Any, hook: UNetHook):
        self.compiled = compiled
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        patch, completed = self.hook.patch, False
        self.hook.prepare(args, kwargs)
        _expect_more_sizes(patch, args, kwargs)
        patch.prepared = patch.compiled = True
        try:
            output = self.compiled(*args, **kwargs)
            completed = True
            return output
        finally:
            patch.prepared = False
            self.hook.finish(completed)


class _CompileAndWatch:
    """The UNet's `compile` while it is patched: compiles as ever, then puts a _CompiledEntry before the result."""

    def __init__(self, unet: UNet, hook: UNetHook):
        # Weak, as it hangs on the UNet: a reference cycle would keep a dropped UNet alive until Python collects it.
        self.unet = WeakLink(unet, pickled=True)
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        unet = self.unet.target()
        type(unet).compile(unet, *args, **kwargs)
        _wrap_compiled_call(unet, self.hook)


def watch_compilation(unet: UNet, hook: UNetHook) -> None:
    """Have the phase chosen outside the graph, whether the UNet was compiled before or is compiled later."""
    unet.compile = _CompileAndWatch(unet, hook)
    _wrap_compiled_call(unet, hook)


def unwatch_compilation(unet: UNet) -> None:
    """Undo `watch_compilation`."""
    unet.__dict__.pop("compile", None)
    if isinstance(unet._compiled_call_impl, _CompiledEntry):
        unet._compiled_call_impl = unet._compiled_call_impl.compiled


def _wrap_compiled_call(unet: UNet, hook: UNetHook) -> None:
    if unet._compiled_call_impl is not None:
        unet._compiled_call_impl = _CompiledEntry(unet._compiled_call_impl, hook)


def _expect_more_sizes(patch: Installation, args: tuple, kwargs: dict) -> None:
    """From the second image size on, have graphs made for any height and width; torch would free one at a time."""
    size = (patch.call.height, patch.call.width)
    if patch.first_size is None:
        patch.first_size = size
    elif size != patch.first_size:
        sample = sample_and_timestep(args, kwargs)[0]
        torch._dynamo.maybe_mark_dynamic(sample, [sample.ndim - 2, sample.ndim - 1])


class EagerEntry:
    """Pre-hook on a module made by torch.compile(unet): prepares the call outside its graph."""

    def __init__(self, hook: UNetHook):
        self.hook = hook

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.hook.prepare(args, kwargs)
        _expect_more_sizes(self.hook.patch, args, kwargs)
        self.hook.patch.prepared = self.hook.patch.compiled = True


class EagerExit:
    """Hook on such a module, also where its call raised: ends the call."""

    def __init__(self, hook: UNetHook):
        self.hook = hook

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.hook.patch.claim.is_mine():
            self.hook.patch.prepared = False
            self.hook.finish(output is not None)
