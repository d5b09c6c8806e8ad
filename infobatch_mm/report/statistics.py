"""Differences between two arms over seeds: their mean, and the interval that it is known to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

#: Chance that one of the intervals of a family misses the true difference.
_ERROR = 0.05
# Differences whose spread is no larger than this share of the values themselves are equal: it is rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Interval:
    """A mean and the two-sided interval about it.

    Attributes:
        mean (float): Of the differences.
        low (float): Lower end.
        high (float): Upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def has_width(self) -> bool:
        """Whether the differences had a spread; without one, an interval says nothing of the next seed."""
        return self.low < self.high

    def negated(self) -> Interval:
        """The interval of the differences with the other sign."""
        return Interval(-self.mean, -self.high, -self.low)


def confidence(num_arms: int) -> float:
    """The level of each of several intervals, so that all of them hold at once with 95 % (Bonferroni).

    Args:
        num_arms (int): Number k of intervals, at least 1.

    Returns:
        float: ``1 - 0.05 / k``.
    """
    assert num_arms >= 1
    return 1 - _ERROR / num_arms


def paired_interval(differences: Sequence[float], level: float, scale: float = 0.0) -> Interval | None:
    """Student's t interval of the mean of paired differences.

    Args:
        differences (Sequence[float]): One for each seed. Both arms of a pair have the seed in common, so that what it
            gives to both is no spread.
        level (float): Confidence, in (0, 1).
        scale (float): Largest absolute value that a difference was taken of. Defaults to 0: the differences' own.

    Returns:
        Interval | None: None where there is one seed, or where a difference is not finite. Of no width where all
        differences are equal, but for rounding: the formula's own limit.
    """
    count = len(differences)
    if count < 2 or not all(map(math.isfinite, differences)):
        return None
    mean = statistics.fmean(differences)
    spread = statistics.stdev(differences)
    if spread <= _ROUNDING * max(scale, *map(abs, differences)):
        return Interval(mean, mean, mean)
    half = float(student.ppf((1 + level) / 2, count - 1)) * spread / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)
