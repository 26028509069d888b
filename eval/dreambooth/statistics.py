"""Paired means and ratios with 95 % bootstrap intervals; NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.fid.scores import Interval

_RESAMPLES = 4000


def paired_difference(values: Sequence[float], base: Sequence[float], groups: Sequence[int] | None = None) -> Interval:
    """Mean of values − base over the same prompts and seeds, with its 95 % percentile bootstrap interval.

    What is hard for every method, such as a seed whose noise suits no prompt, is in both and cancels out.

    Args:
        values, base: [N], of the same prompt and seed in the same place.
        groups: a label for each place; places with the same label are resampled together, as several prompts of one
            seed are. None resamples each by itself.

    Raises:
        ValueError: the lengths differ.
    """
    if len(values) != len(base):
        raise ValueError(f"{len(values)} values and {len(base)} to compare them with")
    differences = np.asarray(values, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    means, counts = _by_group(differences, groups)
    picked = np.random.default_rng(0).integers(0, len(means), (_RESAMPLES, len(means)))
    weights = counts[picked]
    resampled = (means[picked] * weights).sum(1) / weights.sum(1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(float(differences.mean()), float(low), float(high))


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> Interval:
    """Geometric mean of values / base with its 95 % interval: of times of the same rounds."""
    found = paired_difference(np.log(np.asarray(values)), np.log(np.asarray(base)))
    return Interval(*(float(np.exp(value)) for value in (found.value, found.low, found.high)))


def _by_group(differences: np.ndarray, groups: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and count of each group."""
    if groups is None:
        return differences, np.ones(len(differences))
    labels, index = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.bincount(index, minlength=len(labels)).astype(np.float64)
    return np.bincount(index, differences, minlength=len(labels)) / counts, counts
