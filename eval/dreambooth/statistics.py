"""Paired means and ratios with 95 % t intervals, which hold at few seeds too; NumPy and SciPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from eval.fid.scores import Interval

FEWEST = 2
"""An interval needs a spread, and a spread two values."""


def paired_difference(values: Sequence[float], base: Sequence[float], groups: Sequence[int] | None = None) -> Interval:
    """Mean of values − base over the same prompts and seeds, with its 95 % interval by Student's t.

    What is hard for every method, such as a seed whose noise suits no prompt, is in both and cancels out. The interval
    is mean ± t · s with G − 1 degrees of freedom for G groups and s² = G / (G − 1) · Σ_g (Σ_{i in g} (d_i − mean))² /
    N², the variance of a mean of clusters (for groups of one size that of their means). A percentile bootstrap, which
    has the quantiles of a normal distribution and lacks the factor G / (G − 1), covers 87 % at 8 groups.

    Args:
        values, base: [N], of the same prompt and seed in the same place.
        groups: a label for each place; places with the same label count as one observation, as several prompts of one
            seed are not independent. None takes each by itself.

    Raises:
        ValueError: the lengths differ, or there are fewer than two groups.
    """
    if len(values) != len(base):
        raise ValueError(f"{len(values)} values and {len(base)} to compare them with")
    differences = np.asarray(values, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    _, index = np.unique(np.arange(len(values)) if groups is None else np.asarray(groups), return_inverse=True)
    count = len(np.unique(index))
    if count < FEWEST:
        raise ValueError(f"{count} seeds or rounds: an interval needs at least {FEWEST}")
    mean = float(differences.mean())
    deviations = np.bincount(index, differences - mean)
    error = np.sqrt(count / (count - 1) * np.square(deviations).sum()) / len(differences)
    half = float(stdtrit(count - 1, 0.975) * error)
    return Interval(mean, mean - half, mean + half)


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> Interval:
    """Geometric mean of values / base with its 95 % interval, of times of the same rounds; raises as the difference."""
    found = paired_difference(np.log(np.asarray(values)), np.log(np.asarray(base)))
    return Interval(*(float(np.exp(value)) for value in (found.value, found.low, found.high)))
