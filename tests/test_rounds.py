"""images/rounds.py: the order of the rounds, and which timings are stable."""

from __future__ import annotations

import pytest

from agentsd.images.rounds import is_stable, rotated, speed_up


def test_every_item_comes_once_a_round_and_each_begins_one_in_turn():
    rounds = [rotated("abc", number) for number in range(4)]
    assert [one[0] for one in rounds] == ["a", "b", "c", "a"]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert rotated([], 3) == []


@pytest.mark.parametrize(
    ("seconds", "stable"), [([1.0], False), ([1.0, 1.0], True), ([1.15, 1.0, 1.1], True), ([1.0, 1.16], False)]
)
def test_rounds_that_differ_by_more_than_15_percent_are_unstable(seconds, stable):
    assert is_stable(seconds) is stable


@pytest.mark.parametrize(
    ("base", "seconds", "expected"),
    [([4.0, 6.0], [2.0, 3.0], 2.0), ([4.0], [2.0, 2.0], None), ([4.0, 4.0], [2.0], None), (None, [2.0, 2.0], None)],
)
def test_a_single_round_gives_no_speed_up(base, seconds, expected):
    assert speed_up(base, seconds) == expected
