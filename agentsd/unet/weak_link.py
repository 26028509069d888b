"""A weak reference that follows copies: what hangs on a UNet must not keep alive what owns it."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class WeakLink(Generic[T]):
    """Call it to get its target, or None once that is gone.

    In a deep copy it points to the target's copy where the target is copied along, and to nothing otherwise.

    Args:
        target: what to refer to; something that cannot be referenced weakly is not kept at all.
        pickled: whether pickling takes the target along (needed where the target owns this); None is stored otherwise.
    """

    def __init__(self, target: T | None, pickled: bool = False):
        self._pickled = pickled
        self._reference: weakref.ref[T] | None = None
        if target is not None:
            with contextlib.suppress(TypeError):
                self._reference = weakref.ref(target)

    def __call__(self) -> T | None:
        return None if self._reference is None else self._reference()

    def target(self) -> T:
        """Its target, where that is needed.

        Raises:
            RuntimeError: it is gone.
        """
        target = self()
        if target is None:
            raise RuntimeError(
                "agentsd: the model that this patch was put on is gone. Keep a reference to the pipeline or UNet, and "
                "call agentsd.apply_patch on it again"
            )
        return target

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakLink[T]:
        # What owns this registers its copy before its parts are copied.
        return WeakLink(memo.get(id(self())), self._pickled)

    def __reduce__(self) -> tuple:
        return WeakLink, (self() if self._pickled else None, self._pickled)
