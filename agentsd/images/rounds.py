"""How things are timed fairly: in interleaved rounds that begin with another one each time; what is a speed-up."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")

STABLE = 1.15
"""Timings are unstable where the rounds of one thing differ by more than this factor."""


FEWEST = 2
"""Rounds of each that a speed-up needs: of a single one nobody knows how far the next would be from it."""


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
    return len(seconds) >= FEWEST and max(seconds) <= STABLE * min(seconds)


def speed_up(base: Sequence[float] | None, seconds: Sequence[float] | None) -> float | None:
    """How many times as fast something is, by the medians of its rounds and of the base's.

    Args:
        base, seconds: of each round; None where it was not timed.

    Returns:
        None where one of the two has fewer than two rounds. Whether it is steady is for `is_stable` to say.
    """
    if base is None or seconds is None or min(len(base), len(seconds)) < FEWEST:
        return None
    return statistics.median(base) / statistics.median(seconds)
