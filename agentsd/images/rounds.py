"""How things are timed fairly: in interleaved rounds that begin with another one each time; which times are steady."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")

STABLE = 1.15
"""Timings are unstable where the rounds of one thing differ by more than this factor."""


def rotated(items: Sequence[Item], number: int) -> list[Item]:
    """The order of a round: a machine whose speed drifts within a round favours none.

    Example:
        >>> rotated("abc", 1)
        ['b', 'c', 'a']
    """
    turn = number % len(items) if items else 0
    return [*items[turn:], *items[:turn]]


def is_stable(seconds: Sequence[float]) -> bool:
    """Whether something was timed more than once, and its rounds differ by at most 15 %."""
    return len(seconds) > 1 and max(seconds) <= STABLE * min(seconds)
