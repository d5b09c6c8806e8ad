"""Samples hidden once their loss has ceased to change its course."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.checks import is_number, plain, whole_number
from ..core.policy import Snapshot
from ..core.policy_registry import register_policy
from .hiding import HidingPolicy


@register_policy
class IesPolicy(HidingPolicy):
    """Hides a sample while the second difference of its loss stays small: it is mastered.

    Instance-dependent Early Stopping (Yuan et al., ICLR 2025): hidden where the mean of the last three
    ``|l(t) - 2 l(t-1) + l(t-2)|`` is below a tolerance, which is ``score='second_difference'``. No weights: not
    unbiased. Differences: the forward pass by which the paper follows hidden samples is a visit here, see
    :class:`.HidingPolicy`, so that differences are over visits and not over passes.

    Args:
        tolerance (float): Second difference below which a sample is hidden, above 0. The paper has 1e-3 for ten classes
            and 2e-3 for a hundred. Defaults to 1e-3.
        delta (float): Share of the training after which nothing is hidden, in (0, 1]. Defaults to 1.
        min_visits (int): Visits that a sample has had before it is hidden, at least 1. Defaults to 5: three second
            differences take as many.
        rescore_every (int): As :class:`.HidingPolicy` takes it. Defaults to 2.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "ies"
    score = "second_difference"

    def __init__(
        self, tolerance: float = 1e-3, delta: float = 1.0, min_visits: int = 5, rescore_every: int = 2
    ) -> None:
        super().__init__(delta, rescore_every)
        if not is_number(tolerance) or plain(tolerance) <= 0:
            raise ValueError(
                f"tolerance={tolerance!r} is no number above 0: it is the second difference of the loss below which a "
                "sample counts as mastered; use 1e-3"
            )
        self.tolerance = float(tolerance)
        meaning = "it is how often a sample was visited before it is hidden; use 5"
        self.min_visits = whole_number("min_visits", min_visits, 1, meaning)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "tolerance": self.tolerance, "min_visits": self.min_visits}

    def learned(self, snapshot: Snapshot) -> np.ndarray:
        return (snapshot.scores.numpy() < self.tolerance) & (snapshot.times_seen.numpy() >= self.min_visits)
