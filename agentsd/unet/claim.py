"""A patched UNet serves one thread at a time: a second one would change the phase under the first."""

from __future__ import annotations

import sys
import threading
from types import FrameType

from torch import nn

from .weak_link import WeakLink


class Claim:
    """Who is inside a UNet.

    A claim ends with its call. One that was left behind counts no more: its thread has ended, or is no longer inside
    (Ctrl-C inside the UNet runs none of torch's hooks).
    """

    def __init__(self, unet: nn.Module):
        self._unet = WeakLink(unet, pickled=True)
        self._holder: dict[str, int] = {}

    def enter(self) -> None:
        """Claim the UNet for this thread until `leave`.

        Raises:
            RuntimeError: another thread is inside.
        """
        this = threading.get_ident()
        holder = self._holder.setdefault("thread", this)  # atomic: one thread wins
        if holder == this:
            return
        if not self._is_inside(holder):
            self._holder["thread"] = this
            return
        raise RuntimeError(
            "agentsd: two threads call this patched UNet at once. Give each thread its own copy (copy.deepcopy of a "
            "pipeline copies the patch too) or hold a lock around the call"
        )

    def leave(self) -> None:
        """Undo `enter`; no-op in a thread that is not inside."""
        if self.is_mine():
            self._holder.clear()

    def is_mine(self) -> bool:
        """Whether this thread is inside."""
        return self._holder.get("thread") == threading.get_ident()

    def _is_inside(self, thread: int) -> bool:
        """Whether a thread is executing a call of the UNet, told from its stack."""
        unet = self._unet()
        frame: FrameType | None = sys._current_frames().get(thread)
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and unet in (module, vars(module).get("_orig_mod")):
                return True
            frame = frame.f_back
        return False

    def __getstate__(self) -> dict:
        return {"_unet": self._unet, "_holder": {}}  # a copy belongs to nobody
