"""eval/denoising/statistics.py: rises relative to the unpatched loss, honest standard errors, weights of a sampler."""

from __future__ import annotations

import numpy as np
import pytest

from eval.denoising.statistics import mean_rise, rise_of, sampler_weights


def test_the_rise_is_a_ratio_of_means_and_exactly_zero_for_equal_losses():
    unpatched = np.array([0.1, 0.3, 0.2])
    rise = rise_of(unpatched, unpatched.copy())
    assert (rise.value, rise.standard_error) == (0.0, 0.0)
    assert rise_of(1.25 * unpatched, unpatched).value == pytest.approx(0.25)
    # A rise that is the same share of every image's loss is known without error.
    assert rise_of(1.25 * unpatched, unpatched).standard_error == pytest.approx(0, abs=1e-12)
    assert rise_of(unpatched + [0.0, 0.0, 0.06], unpatched).value == pytest.approx(0.1)


def simulated(random, images):
    """Losses of images that differ much from each other, and little by method: what pairing is for."""
    difficulty = random.lognormal(0, 0.5, images)
    unpatched = difficulty * random.normal(1, 0.05, images)
    losses = difficulty * random.normal(1.1, 0.05, images)
    return losses, unpatched


def test_the_standard_error_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    found = [rise_of(*simulated(random, 64)) for _ in range(2000)]
    covered = np.mean([abs(rise.value - 0.1) < 1.96 * rise.standard_error for rise in found])
    assert 0.92 < covered < 0.97
    # Half as large as the spread of images alone would make it, or less: the differences are paired.
    unpaired = np.sqrt(2) * 0.53 / 8
    assert np.mean([rise.standard_error for rise in found]) < unpaired / 5


def test_the_mean_over_timesteps_counts_an_image_once():
    random = np.random.default_rng(1)
    losses, unpatched = simulated(random, 64)
    one = rise_of(losses, unpatched)
    # The same losses at two timesteps are no more evidence than at one.
    both = mean_rise([(losses, unpatched)] * 2, [3, 1])
    assert both.value == pytest.approx(one.value) and both.standard_error == pytest.approx(one.standard_error)
    other = simulated(random, 64)
    mixed = mean_rise([(losses, unpatched), other], [1, 3])
    assert mixed.value == pytest.approx(0.25 * one.value + 0.75 * rise_of(*other).value)

    covered = []
    for _ in range(500):
        difficulty = random.lognormal(0, 0.5, 64)  # shared by both timesteps
        pairs = []
        for truth in (0.1, 0.3):
            unpatched = difficulty * random.normal(1, 0.05, 64)
            pairs.append((difficulty * random.normal(1 + truth, 0.05, 64), unpatched))
        rise = mean_rise(pairs, [1, 1])
        covered.append(abs(rise.value - 0.2) < 1.96 * rise.standard_error)
    assert 0.91 < np.mean(covered) < 0.98


def test_each_sampled_timestep_counts_for_the_nearest_measured_one():
    assert sampler_weights([100, 500, 900], [0, 100, 299, 301, 800, 999]) == [3, 1, 2]
    assert sampler_weights([100, 500], [300]) == [1, 0]
    assert sum(sampler_weights([60, 170, 280], range(1, 1000, 20))) == 50
