"""Compiled UNets: the phase is chosen before the graph is entered, as no graph can read the timestep on the host."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from .conditioning import sample_and_timestep
from .layers import UNet
from .threads import CallLock

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

    @property
    def unet(self) -> UNet: ...

    def prepare(self, args: tuple, kwargs: dict, compiled: bool = False) -> None: ...

    def finish(self, completed: bool) -> None: ...


class CompiledEntry:
    """Prepares each call of a compiled UNet outside its graph, and ends it there.

    It stands before the call that unet.compile() made. Around a module that torch.compile(unet) made, `before` and
    `after` are hooks.
    """

    def __init__(self, patch: Patch, compiled: Any = None):
        self.patch = patch
        self.compiled = compiled
        self._first_size: tuple[int, int] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = None
        self.before(None, args, kwargs)
        try:
            output = self.compiled(*args, **kwargs)
            return output
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise RuntimeError(_TOO_MANY_GRAPHS) from error
        finally:
            self.after(None, args, output)

    def before(self, module: nn.Module | None, args: tuple, kwargs: dict) -> None:
        """The pre-hook."""
        self.patch.prepare(args, kwargs, compiled=True)
        sample = sample_and_timestep(args, kwargs)[0]
        size = (int(sample.shape[-2]), int(sample.shape[-1]))
        if self._first_size not in (None, size):
            # Have graphs made for any height and width; torch would free one at a time.
            torch._dynamo.maybe_mark_dynamic(sample, [sample.ndim - 2, sample.ndim - 1])
        self._first_size = self._first_size or size
        self.patch.prepared = True

    def after(self, module: nn.Module | None, args: tuple, output: Any) -> None:
        """The hook, also where the call raised: `output` is None then."""
        if self.patch.lock.is_mine():
            self.patch.prepared = False
            self.patch.finish(output is not None)


def watch_compilation(unet: UNet, patch: Patch) -> None:
    """Have the phase chosen outside the graph, whether the UNet was compiled before or is compiled later."""
    unet.compile = partial(_compile_and_watch, patch)
    _wrap_compiled_call(unet, patch)


def unwatch_compilation(unet: UNet) -> None:
    """Undo `watch_compilation`."""
    unet.__dict__.pop("compile", None)
    if isinstance(unet._compiled_call_impl, CompiledEntry):
        unet._compiled_call_impl = unet._compiled_call_impl.compiled


def _compile_and_watch(patch: Patch, *args: Any, **kwargs: Any) -> None:
    unet = patch.unet
    type(unet).compile(unet, *args, **kwargs)
    _wrap_compiled_call(unet, patch)


def _wrap_compiled_call(unet: UNet, patch: Patch) -> None:
    if unet._compiled_call_impl is not None:
        unet._compiled_call_impl = CompiledEntry(patch, unet._compiled_call_impl)
