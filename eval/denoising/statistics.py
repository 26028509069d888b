"""Rises of a loss relative to the unpatched one, with paired standard errors; NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Cells = dict[tuple[str, int], np.ndarray]
"""(name of the scenario, timestep) -> losses of all images, [N]."""


@dataclass(frozen=True)
class Rise:
    """A relative rise, 0.1 for 10 %, and its standard error over images."""

    value: float
    standard_error: float


def rise_of(losses: np.ndarray, unpatched: np.ndarray) -> Rise:
    """By how much the mean loss rises over the unpatched one, for the same images and noise.

    mean(losses) / mean(unpatched) − 1. The standard error is that of a ratio of paired means (the delta method): the
    differences between images that both losses share cancel out. It covers the choice of images and noise, not that of
    the destination tokens, which is the same for all.

    Args:
        losses, unpatched: [N] of the same images in the same order, N ≥ 2.
    """
    influence = _influence(losses, unpatched)
    value = float(np.mean(losses - unpatched) / np.mean(unpatched))
    return Rise(value, _standard_error(influence))


def mean_rise(pairs: Sequence[tuple[np.ndarray, np.ndarray]], weights: Sequence[float]) -> Rise:
    """The weighted mean of the rises of several timesteps, as `rise_of` finds each.

    All timesteps have the same images, so an image's influences on all of them are summed before their spread is taken.

    Args:
        pairs: (losses, unpatched) of each timestep.
        weights: of each timestep, not all zero.
    """
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    value = sum(share * rise_of(*pair).value for share, pair in zip(shares, pairs))
    influence = sum(share * _influence(*pair) for share, pair in zip(shares, pairs))
    return Rise(float(value), _standard_error(influence))


def sampler_weights(measured: Sequence[int], sampled: Sequence[int]) -> list[int]:
    """How many of a sampler's timesteps lie nearest to each measured one; of two equally near, the smaller has it."""
    weights = [0] * len(measured)
    for timestep in sampled:
        weights[min(range(len(measured)), key=lambda i: (abs(measured[i] - timestep), measured[i]))] += 1
    return weights


def _influence(losses: np.ndarray, unpatched: np.ndarray) -> np.ndarray:
    base = np.mean(unpatched)
    ratio = 1 + np.mean(losses - unpatched) / base
    return (losses - ratio * unpatched) / base


def _standard_error(influence: np.ndarray) -> float:
    return float(np.std(influence, ddof=1) / np.sqrt(len(influence)))
