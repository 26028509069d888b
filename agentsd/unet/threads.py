"""A patched UNet serves one thread at a time, and nothing of it changes under a call or a run of another thread."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from .weak_link import WeakLink

# The functions that run while a module is called; not its forward, which may be called directly, past all hooks.
_CALLING = ("_call_impl", "_wrapped_call_impl", "__call__")

changes = threading.RLock()
"""Held while a patch is put on or off, so that two threads do not do so at once."""


class CallLock:
    """Who is inside a UNet.

    A lock ends with its call. One that was left behind counts no more: its thread has ended, or is no longer inside
    (Ctrl-C inside the UNet runs none of torch's hooks).
    """

    def __init__(self, unet: nn.Module):
        self._unet = WeakLink(unet, pickled=True)
        self._holder: dict[str, int] = {}

    def enter(self) -> None:
        """Lock the UNet for this thread until `leave`.

        Raises:
            RuntimeError: another thread is inside.
        """
        this = threading.get_ident()
        holder = self._holder.setdefault("thread", this)  # atomic: one thread wins
        if holder == this:
            return
        if not is_inside(self._unet(), holder):
            self._holder["thread"] = this
            return
        raise RuntimeError(
            "agentsd: two threads call this patched UNet at once. Give each thread its own copy (copy.deepcopy of a "
            "pipeline copies the patch too) or hold a lock around the whole run"
        )

    def leave(self) -> None:
        """Undo `enter`; no-op in a thread that is not inside."""
        if self.is_mine():
            self._holder.clear()

    def is_mine(self) -> bool:
        """Whether this thread is inside."""
        return self._holder.get("thread") == threading.get_ident()

    def __getstate__(self) -> dict:
        return {"_unet": self._unet, "_holder": {}}  # a copy belongs to nobody


def callers(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and those that called it."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_inside(unet: Any, thread: int | None = None) -> bool:
    """Whether a thread (None: this one) is executing a call of a UNet; its state may say so after Ctrl-C too."""
    frame = sys._getframe(1) if thread is None else sys._current_frames().get(thread)
    return any(_calls(one, unet) for one in callers(frame))


def refuse_change(unet: nn.Module, in_run: Callable[[FrameType], bool], owner: int | None) -> None:
    """Refuse to change the patch of a UNet that is in use.

    Args:
        unet: the UNet, patched or not.
        in_run: whether a frame belongs to a run of the patched UNet that has not ended.
        owner: the thread whose `with agentsd.patched` block the patch belongs to, if any.

    Raises:
        RuntimeError: a call is in progress, or a run in another thread, or another thread owns the patch.
    """
    this = threading.get_ident()
    why = None
    if is_inside(unet):
        why = "a call of it is in progress in this thread: change the patch between two calls"
    # Without this thread's own frame, which a variable of it would keep alive, and the UNet with it.
    others = [(thread, frame) for thread, frame in sys._current_frames().items() if thread != this]
    for thread, frame in others:
        if any(_is_run_of(one, unet) or in_run(one) for one in callers(frame)):
            why = "another thread is in the middle of a run of it: hold a lock around each change and each whole run"
        elif thread == owner:
            why = "it is patched for the `with agentsd.patched` block of another thread: wait until that block ends"
    if why is not None:
        why += ", or give each thread its own copy (copy.deepcopy(pipe))"
        raise RuntimeError(f"agentsd: the patch of this UNet cannot be changed now, as {why}. Nothing was changed")


def _calls(frame: FrameType, unet: Any) -> bool:
    """Whether a frame is a call of the UNet, or of what torch.compile wrapped it in."""
    if frame.f_code.co_name not in _CALLING:
        return False
    module = frame.f_locals.get("self")
    return isinstance(module, nn.Module) and unet in (module, vars(module).get("_orig_mod"))


def _is_run_of(frame: FrameType, unet: nn.Module) -> bool:
    """Whether a frame is a call of the UNet, or of a diffusers pipeline that has it."""
    owner = frame.f_locals.get("self")
    in_pipeline = isinstance(owner, DiffusionPipeline) and frame.f_code.co_name == "__call__"
    return _calls(frame, unet) or (in_pipeline and getattr(owner, "unet", None) is unet)
