"""Compiled UNets: the phase is chosen before the graph is entered, as no graph can read the timestep on the host."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from .conditioning import sample_and_timestep
from .layers import UNet
from .threads import CallLock
from .weak_link import WeakLink

COMPILED_UNSEEN = (
    "agentsd must choose its phase outside the compiled graph: compile with unet.compile(fullgraph=True), or call "
    "agentsd.apply_patch again after torch.compile(unet, fullgraph=True). To export it, call agentsd.remove_patch first"
)

_TOO_MANY_GRAPHS = (
    "agentsd: torch has compiled this UNet for as many settings, phases and presets as it allows. Call "
    "torch._dynamo.reset() after a change of settings to begin anew, or raise torch._dynamo.config.recompile_limit "
    "(a preset with step caching takes up to four graphs, one without it two)"
)


class Patch(Protocol):
    """What is needed of a patch."""

    prepared: bool
    lock: CallLock

    def prepare(self, args: tuple, kwargs: dict, compiled: bool = False) -> None: ...

    def finish(self, completed: bool) -> None: ...


class _CompiledEntry:
    """Stands before a UNet's compiled call: prepares the call outside the graph, then enters it."""

    def __init__(self, compiled: Any, patch: Patch):
        self.compiled = compiled
        self.patch = patch
        self.first_size: tuple[int, int] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        patch, completed = self.patch, False
        patch.prepare(args, kwargs, compiled=True)
        self.first_size = _expect_more_sizes(self.first_size, args, kwargs)
        patch.prepared = True
        try:
            output = self.compiled(*args, **kwargs)
            completed = True
            return output
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise RuntimeError(_TOO_MANY_GRAPHS) from error
        finally:
            patch.prepared = False
            patch.finish(completed)


class _CompileAndWatch:
    """The UNet's `compile` while it is patched: compiles as ever, then puts a _CompiledEntry before the result."""

    def __init__(self, unet: UNet, patch: Patch):
        # Weak, as it hangs on the UNet: a reference cycle would keep a dropped UNet alive until Python collects it.
        self.unet = WeakLink(unet, pickled=True)
        self.patch = patch

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        unet = self.unet.target()
        type(unet).compile(unet, *args, **kwargs)
        _wrap_compiled_call(unet, self.patch)


def watch_compilation(unet: UNet, patch: Patch) -> None:
    """Have the phase chosen outside the graph, whether the UNet was compiled before or is compiled later."""
    unet.compile = _CompileAndWatch(unet, patch)
    _wrap_compiled_call(unet, patch)


def unwatch_compilation(unet: UNet) -> None:
    """Undo `watch_compilation`."""
    unet.__dict__.pop("compile", None)
    if isinstance(unet._compiled_call_impl, _CompiledEntry):
        unet._compiled_call_impl = unet._compiled_call_impl.compiled


def _wrap_compiled_call(unet: UNet, patch: Patch) -> None:
    if unet._compiled_call_impl is not None:
        unet._compiled_call_impl = _CompiledEntry(unet._compiled_call_impl, patch)


def _expect_more_sizes(first: tuple[int, int] | None, args: tuple, kwargs: dict) -> tuple[int, int]:
    """From the second image size on, have graphs made for any height and width; torch would free one at a time.

    Args:
        first: (height, width) of the latent in the first call; None in that call.
        args, kwargs: of this call.

    Returns:
        The first size from now on.
    """
    sample = sample_and_timestep(args, kwargs)[0]
    size = (int(sample.shape[-2]), int(sample.shape[-1]))
    if first is not None and size != first:
        torch._dynamo.maybe_mark_dynamic(sample, [sample.ndim - 2, sample.ndim - 1])
    return first or size


class EagerEntry:
    """Pre-hook on a module made by torch.compile(unet): prepares the call outside its graph."""

    def __init__(self, patch: Patch):
        self.patch = patch
        self.first_size: tuple[int, int] | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.patch.prepare(args, kwargs, compiled=True)
        self.first_size = _expect_more_sizes(self.first_size, args, kwargs)
        self.patch.prepared = True


class EagerExit:
    """Hook on such a module, also where its call raised: ends the call."""

    def __init__(self, patch: Patch):
        self.patch = patch

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.patch.lock.is_mine():
            self.patch.prepared = False
            self.patch.finish(output is not None)
