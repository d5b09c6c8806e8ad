"""From scores to norms of gradients: the mean squared norm at a score, as it rises with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

_FOLDS = 5


@dataclass(frozen=True)
class Calibration:
    """The mean squared norm by the score, never falling.

    Attributes:
        scores (ndarray): Scores that were seen, rising, shape ``(m,)``.
        squares (ndarray): Mean squared norm at each, shape ``(m,)``.
    """

    scores: np.ndarray
    squares: np.ndarray

    def norms(self, scores: np.ndarray) -> np.ndarray:
        """Root mean square norms at scores: between seen ones on a line, beyond them as at the nearest.

        Args:
            scores (ndarray): Any shape; NaN for samples without one, whose norm is NaN.
        """
        return np.sqrt(np.interp(scores, self.scores, self.squares))


def calibrate(scores: np.ndarray, squares: np.ndarray) -> Calibration:
    """Fit mean squared norms that never fall where scores rise, by least squares (Barlow et al., 1972).

    Args:
        scores (ndarray): Shape ``(n,)``, finite.
        squares (ndarray): Squared norms of the same samples' gradients, shape ``(n,)``.
    """
    seen, places = np.unique(scores, return_inverse=True)
    weights = np.bincount(places).astype(float)
    means = np.bincount(places, weights=squares) / weights
    return Calibration(seen, isotonic_regression(means, weights=weights).x)


def calibrated(scores: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Norms that scores of one visit foretell for the other, by what other samples show.

    Each fifth of the samples is calibrated by the remaining four: a curve that was fitted to a sample knows it.

    Args:
        scores (ndarray): Shape ``(n, 2)``; NaN where a visit has none.
        squares (ndarray): Squared norms of the same visits' gradients, shape ``(n, 2)``.

    Returns:
        ndarray: Of the same shape; NaN where there is no score.
    """
    found = np.full(scores.shape, np.nan)
    fold: np.ndarray = np.arange(len(scores)) % _FOLDS  # the order is the draw's, and random
    for place in range(_FOLDS):
        others = fold != place
        taken, foretold = scores[others].ravel(), squares[others][:, ::-1].ravel()
        usable = np.isfinite(taken)
        if usable.any():
            found[~others] = calibrate(taken[usable], foretold[usable]).norms(scores[~others])
    return found
