"""Limit and noise scale from constructed gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from infobatch_mm.core.worth import limit
from infobatch_mm.forecast.estimates import (
    RESAMPLES,
    efficiencies,
    estimate,
    limits,
    noise_scales,
    resampled,
    share_between,
)

from .constructed import measured, of_norms


def once(number: int) -> np.ndarray:
    return np.ones((1, number))


def noisy(norms: np.ndarray, seed: int = 0) -> np.ndarray:
    """Norms at two visits, whose mean square is the square of the given ones."""
    factors = np.random.default_rng(seed).lognormal(0.0, 0.8, (len(norms), 2))
    return norms[:, None] * factors / np.exp(0.8**2)


def test_the_squared_mean_gradient_is_unbiased() -> None:
    source = np.random.default_rng(1)
    mean = source.normal(size=6)
    found = []
    for _ in range(600):
        of_sample = source.normal(size=(20, 1, 6))  # which both visits of a sample share
        gradients = mean + of_sample + source.normal(size=(20, 2, 6))
        taken = measured(gradients, num_samples=10**9)
        scale = float(noise_scales(taken, once(20))[0])
        found.append(taken.squares.mean() / (1 + scale))
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - mean @ mean) < 4 * error
    biased = mean @ mean + 6 * 1.5 / 20  # what the squared norm of the plain mean is in expectation
    assert abs(np.mean(found) - biased) > 4 * error


def test_of_all_samples_the_noise_scale_is_the_data_sets_own() -> None:
    gradients = np.repeat(np.random.default_rng(2).normal(0.5, 1.0, (30, 1, 6)), 2, 1)
    each, mean = gradients[:, 0], gradients[:, 0].mean(0)
    expected = ((each - mean) ** 2).sum(1).mean() / (mean @ mean)
    taken = measured(gradients)
    assert noise_scales(taken, once(30))[0] == pytest.approx(expected)
    # Sketches, which are not exact, are for the interval alone.
    assert noise_scales(replace(taken, sketches=1.1 * taken.sketches), once(30))[0] == pytest.approx(expected)


def test_a_mean_that_is_not_seen_leaves_an_infinite_noise_scale() -> None:
    gradients = np.random.default_rng(3).normal(size=(40, 2, 50))
    gradients -= gradients.mean((0, 1))
    found = estimate(noise_scales(measured(gradients, num_samples=10**6), resampled(40, 0)))
    assert np.isinf(found.value) and found.plain()[0] is None and not np.isnan(found.low)


def test_noise_within_samples_does_not_inflate_the_limit() -> None:
    equal = of_norms(noisy(np.ones(4000)), num_samples=10**6)
    assert limits(equal, once(4000))[0] < 1.02
    assert limit(np.sqrt(equal.squares.mean(1))) > 1.2  # which counts it as a difference between samples
    assert share_between(equal) < 0.2
    unequal = np.where(np.arange(4000) % 5, 0.3, 3.0)
    assert limits(of_norms(noisy(unequal), num_samples=10**6), once(4000))[0] == pytest.approx(limit(unequal), rel=0.05)


def test_without_noise_the_limit_of_all_samples_is_the_limit() -> None:
    norms = np.random.default_rng(4).lognormal(0.0, 1.0, 50)
    found = of_norms(np.repeat(norms[:, None], 2, 1))
    assert limits(found, once(50))[0] == pytest.approx(limit(norms))
    assert share_between(found) == pytest.approx(1.0)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    source = np.random.default_rng(6)
    truth = limit(np.where(np.arange(1000) < 300, 2.0, 0.5))
    mean = np.full(4, 0.7)
    held = []
    for trial in range(60):
        norms = np.where(source.random(150) < 0.3, 2.0, 0.5)
        counts = resampled(150, trial)
        found = estimate(limits(of_norms(noisy(norms, trial), num_samples=10**6), counts))
        gradients = mean + source.normal(size=(150, 2, 4))
        scale = estimate(noise_scales(measured(gradients, num_samples=10**6), counts))
        held.append([found.low <= truth <= found.high, scale.low <= 4 / (mean @ mean) <= scale.high])
    assert (np.mean(held, 0) > 0.8).all()


def test_resamples_begin_with_the_sample_itself() -> None:
    counts = resampled(9, 0)
    assert counts.shape == (1 + RESAMPLES, 9) and (counts[0] == 1).all() and (counts.sum(1) == 9).all()
    assert (resampled(9, 0) == counts).all() and (resampled(9, 1) != counts).any()


def test_efficiency_is_worth_over_cost() -> None:
    squares, chances = np.array([[1.0, 1.0], [9.0, 9.0]]), np.array([[0.25, 0.25], [0.75, 0.75]])
    assert efficiencies(squares, chances, once(2))[0] == pytest.approx((10 / (4 + 12)) / 0.5)
    assert efficiencies(np.zeros((2, 2)), chances, once(2))[0] == pytest.approx(1.0)


def test_noise_scales_of_resamples_are_of_all_their_pairs() -> None:
    size, dims = 12, 3
    gradients = np.random.default_rng(3).normal(size=(size, 2, dims)) + 1.0
    counts = resampled(size, 0)[:4]
    found = noise_scales(measured(gradients), counts)
    means = gradients.mean(1)
    for row, times in enumerate(counts):
        pairs = [(i, j) for i in range(size) for j in range(size) if i != j]
        weights = np.array([times[i] * times[j] for i, j in pairs])
        products = np.array([means[i] @ means[j] for i, j in pairs])
        same = (times @ (gradients[:, 0] * gradients[:, 1]).sum(1)) / size
        squared = (weights @ products) / weights.sum() * (1 - 1 / size) + same / size
        mean_square = (times @ (gradients**2).sum(2).mean(1)) / size
        assert found[row] == pytest.approx((mean_square - squared) / squared, rel=1e-4)
