"""What a few hundred gradients say of all: limit and noise scale, with intervals from resampled samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.worth import noise_scale
from .gradients import Measured

#: Resamples of an interval, and how much of them it holds.
RESAMPLES, INSIDE = 1000, 0.95


@dataclass(frozen=True)
class Estimate:
    """A number and its interval.

    Attributes:
        value (float): The estimate.
        low (float): Lower end of the interval.
        high (float): Upper end.
    """

    value: float
    low: float
    high: float

    def plain(self) -> list[float | None]:
        """Value and ends, for JSON, which has no infinity."""
        return [each if np.isfinite(each) else None for each in (self.value, self.low, self.high)]


def resampled(number: int, seed: int) -> np.ndarray:
    """How often each sample is taken: once in the first row, then as drawn with replacement.

    Args:
        number (int): Samples n.
        seed (int): Of the draws.

    Returns:
        ndarray: Shape ``(1 + RESAMPLES, n)``, float64.
    """
    draws = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), RESAMPLES)
    return np.concatenate([np.ones((1, number)), draws])


def estimate(values: np.ndarray) -> Estimate:
    """The first value, and the percentile interval of the others (Efron, 1979).

    Args:
        values (ndarray): Shape ``(1 + RESAMPLES,)``; may be infinite.
    """
    # Of values that are there: between infinite ones nothing can be interpolated.
    ends = np.percentile(values[1:], [50 - 50 * INSIDE, 50 + 50 * INSIDE], method="inverted_cdf")
    return Estimate(float(values[0]), float(ends[0]), float(ends[1]))


def limits(measured: Measured, counts: np.ndarray) -> np.ndarray:
    """Limit of any unbiased pruning, ``1 + cv(h)**2``, that the noise of single visits does not inflate.

    The mean square of h is estimated by the product of the norms of a sample's two visits, and the square of the mean
    by products of norms of different samples: both hold the same factor for noise within samples, which divides out.
    Squares of single norms, or of their mean, would count it as a difference between samples.

    Args:
        measured (Measured): Of n samples.
        counts (ndarray): See :func:`resampled`.

    Returns:
        ndarray: Shape ``(len(counts),)``, at least 1.
    """
    norms = np.sqrt(measured.squares)
    same = _means(norms[:, 0] * norms[:, 1], counts)
    means = norms.mean(1)
    across = _pairs((counts @ means) ** 2, means**2, counts)
    squared = _of_all(across, same, measured.num_samples)
    return np.maximum(1.0, np.divide(same, squared, out=np.ones_like(same), where=squared > 0))


def noise_scales(measured: Measured, counts: np.ndarray) -> np.ndarray:
    """Noise scale of the gradient of one visit, in samples; see :func:`.core.worth.noise_scale`.

    The squared norm of the mean is estimated without bias, by products of gradients of different samples: exactly in
    the first row, from sketches in the others.

    Returns:
        ndarray: Shape ``(len(counts),)``; infinite where the mean is not seen.
    """
    # Each sample's two gradients were added up: products of sums are four products.
    across = _pairs(((counts @ measured.sketches) ** 2).sum(1), (measured.sketches**2).sum(1, dtype=float), counts) / 4
    exact = _pairs(np.array([measured.square_of_sum]), measured.own_squares, counts[:1])[0] / 4
    across += exact - across[0]
    squared = _of_all(across, _means(measured.inner, counts), measured.num_samples)
    mean_squares = _means(measured.squares.mean(1), counts)
    return np.array([noise_scale(*each) for each in zip(mean_squares, squared, strict=True)])


def share_between(measured: Measured) -> float:
    """Share of the variance of squared norms that is between samples, in [0, 1]; the rest is between their visits."""
    first, second = measured.squares.T
    variance = (first.var(ddof=1) + second.var(ddof=1)) / 2
    if variance <= 0:
        return 0.0
    return float(np.clip(np.cov(first, second)[0, 1] / variance, 0.0, 1.0))


def efficiencies(squares: np.ndarray, chances: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Efficiency of a pass, worth over cost, by squared norms that its chances were not drawn up from.

    Args:
        squares (ndarray): Shape ``(n, V)``.
        chances (ndarray): Of the same shape.
        counts (ndarray): See :func:`resampled`.

    Returns:
        ndarray: Shape ``(len(counts),)``.
    """
    paid, full, added = (counts @ each.sum(1) for each in (chances, squares, squares / chances))
    worth = np.divide(full, added, out=paid / chances.size, where=added > 0)
    return worth * chances.size / paid


def _means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return counts @ values / counts.sum(1)


def _pairs(square_of_sum: np.ndarray, squares: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean product over pairs of different samples, from the square of the sum and each one's own square."""
    # A sample that was taken twice makes no pair with itself.
    repeats: np.ndarray = counts**2
    return (square_of_sum - repeats @ squares) / (counts.sum(1) ** 2 - repeats.sum(1))


def _of_all(across: np.ndarray, same: np.ndarray, num_samples: int) -> np.ndarray:
    """Square of the mean over a data set of N samples: one in N of its pairs is a sample with itself."""
    return across * (1 - 1 / num_samples) + same / num_samples
