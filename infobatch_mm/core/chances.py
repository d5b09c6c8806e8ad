"""Chances with which a pass visits samples, and the plans that are drawn with them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import is_number, plain
from .plan import Plan, drawn_plan, thinned_plan
from .systematic import ONE, in_units, proportional, systematic


@dataclass(frozen=True)
class Thinning:
    """A mask and a ratio: the common case of chances.

    Attributes:
        candidates (Tensor): Samples that are skipped with chance ``ratio``, shape ``(N,)``, bool; the others are
            visited for certain.
        ratio (float): In [0, 1).
        threshold (float, optional): Score below which a sample is a candidate, for the log.
    """

    candidates: Tensor
    ratio: float
    threshold: float | None = None

    def drawn(self, generator: torch.Generator, multiple_of: int) -> Plan | None:
        """A plan with these chances, as near as full batches allow; None where it would leave nothing out.

        The number of kept candidates is brought to where the visits make full batches, but no further than that a
        weight stays within twice the nominal 1/(1-r).
        """
        num_candidates = int(torch.count_nonzero(self.candidates))
        num_others = self.candidates.numel() - num_candidates
        num_kept = kept_count(num_candidates, num_others, self.ratio, multiple_of)
        if num_kept == num_candidates:
            return None
        return thinned_plan(self.candidates, num_kept, generator, threshold=self.threshold)

    def by_sample(self, where: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The chance of each sample, or of some, shape ``(N,)``, float64."""
        return np.where(self.candidates.numpy()[where], 1.0 - self.ratio, 1.0)

    def fault(self, num_samples: int) -> str | None:
        """What is wrong with it; None for nothing."""
        mask, ratio = self.candidates, plain(self.ratio)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (num_samples,):
            return f"candidates are {_described(mask)}, expected a bool tensor of shape ({num_samples},)"
        if not is_number(ratio) or not 0 <= ratio < 1:
            return f"ratio={self.ratio!r}, expected a number in [0, 1)"
        return None


@dataclass(frozen=True)
class Chances:
    """A chance for each sample.

    Attributes:
        values (Tensor): Shape ``(N,)``, float32 or float64, in (0, 1]; with ``weighted=False`` also 0.
        weighted (bool): Whether a visit weighs the inverse of its chance, which makes sums over the plan unbiased.
            Otherwise every visit weighs ``weight``. Defaults to True.
        weight (float): See above; a factor on the learning rate under SGD. Defaults to 1.
        lowest (float, optional): Smallest chance that bringing the visits to full batches may lead to, where visits are
            weighted: weights never exceed its inverse. Defaults to half of the smallest one.
        threshold (float, optional): Score below which a sample may be left out, for the log.
    """

    values: Tensor
    weighted: bool = True
    weight: float = 1.0
    lowest: float | None = None
    threshold: float | None = None

    def drawn(self, generator: torch.Generator, multiple_of: int) -> Plan | None:
        """A plan with these chances, as near as full batches allow; None where it would leave nothing out.

        The sum of the chances is brought to the nearest multiple by a factor on the ones below 1. Exactly so many
        samples are drawn, each with exactly its chance, and weighed by its inverse. Unweighted samples that are certain
        give way at random where nothing else can.
        """
        chances = self.values.numpy().astype(np.float64)
        certain, uncertain = np.flatnonzero(chances >= 1.0), np.flatnonzero((chances < 1.0) & (chances > 0.0))
        found = chances[uncertain]
        lowest = self._lowest(found)
        num_drawn = _drawn_count(float(found.sum()), len(certain), len(uncertain), lowest, multiple_of)
        if num_drawn is None and not self.weighted:
            certain, uncertain = certain[:0], np.flatnonzero(chances > 0.0)
            found = chances[uncertain]
            num_drawn = _drawn_count(float(found.sum()), 0, len(uncertain), lowest, multiple_of)
        if num_drawn is None or len(certain) + num_drawn == len(chances):
            return None
        units = in_units(proportional(found, num_drawn, lowest), num_drawn)
        places = systematic(units, generator)
        weights = ONE / units[places] if self.weighted else np.ones(len(places))
        plan = drawn_plan(certain, uncertain[places], weights, generator, self.threshold)
        return plan if self.weighted else replace(plan, weights=plan.weights * self.weight)

    def by_sample(self, where: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The chance of each sample, or of some, shape ``(N,)``, float64."""
        return self.values.numpy()[where].astype(np.float64)

    def fault(self, num_samples: int) -> str | None:
        """What is wrong with them; None for nothing."""
        values, lowest = self.values, plain(self.lowest)
        if not isinstance(values, Tensor) or not values.is_floating_point() or values.shape != (num_samples,):
            return f"values are {_described(values)}, expected floats of shape ({num_samples},)"
        least = "(0, 1]" if self.weighted else "[0, 1]"
        outside = ~((values > 0) | ((values == 0) & (not self.weighted))) | (values > 1)  # NaN is outside, too
        if bool(outside.any()):
            where = int(outside.nonzero()[0])
            return f"sample {where} has the chance {float(values[where])}, expected one in {least}"
        if lowest is not None and (not is_number(lowest) or not 0 < lowest <= 1):
            return f"lowest={self.lowest!r}, expected a number in (0, 1]"
        return None

    def _lowest(self, found: np.ndarray) -> float:
        if not self.weighted:
            return 0.0
        smallest = float(found.min(initial=1.0))
        return smallest / 2 if self.lowest is None else min(self.lowest, smallest)


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _drawn_count(total: float, certain: int, uncertain: int, lowest: float, multiple_of: int) -> int | None:
    """How many of the uncertain samples to draw, near the sum of their chances; None where nothing fits."""
    lower = math.floor((certain + total) / multiple_of + 1e-9) * multiple_of - certain
    least = max(1, math.ceil(lowest * uncertain - 1e-9))
    fitting = [k for k in (lower, lower + multiple_of) if least <= k <= uncertain]
    if not fitting:  # the next larger multiple, if the bounds allow one
        larger = lower + multiple_of * max(1, math.ceil((least - lower) / multiple_of))
        fitting = [larger] if least <= larger <= uncertain else []
    # Of two that are as near the lower: the last digits of a sum are not to decide, they differ between machines.
    return min(fitting, key=lambda k: round(abs(k - total), 6), default=None)


def kept_count(num_candidates: int, num_others: int, prune_ratio: float, multiple_of: int) -> int:
    """How many of the candidates to keep: near ``(1 - r) * n``, and such that the visits divide.

    Args:
        num_candidates (int): Number n of well-learned samples.
        num_others (int): Number of samples that are kept for certain.
        prune_ratio (float): r in [0, 1).
        multiple_of (int): Number m that ``num_others`` + k shall be a multiple of.

    Returns:
        int: k in [1, n], of those that divide the nearest to ``(1 - r) * n``, and at least half of it, so that the
        weight n/k never exceeds 2/(1-r): one sample that stands for a thousand would make a step of its own. n itself
        where no such k divides (only possible for n < 2m) or where n is 0: the pass is then a full one, which is
        unbiased as well.
    """
    target = num_candidates * (1 - prune_ratio)
    lower = math.floor((num_others + target) / multiple_of) * multiple_of - num_others
    # The tolerance is for targets such as 0.3 * 10, whose half is not to fall on the wrong side of a whole number.
    fitting = [k for k in (lower, lower + multiple_of) if max(1, target / 2 - 1e-9) <= k <= num_candidates]
    return min(fitting, key=lambda k: abs(k - target), default=num_candidates)
