"""Chances in proportion to gradients: the unbiased pruning of the smallest variance."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.annealed import PI_MIN
from ..core.policy_registry import register_policy
from .proportional import ProportionalPolicy


@register_policy
class VariancePolicy(ProportionalPolicy):
    """Visits each sample with a chance in proportion to the norm of its gradient, and weighs it by the inverse.

    For a given number of visits no other unbiased choice leaves the gradient of a pass less noisy (Neyman, 1934;
    Katharopoulos and Fleuret, ICML 2018, for batches). The score is the norm, so ``score='gradient'`` is the default;
    with another score the chances are in proportion to it. Samples without a score are visited for certain.

    Args:
        prune_ratio (float): Share of its visits that a pass saves, in [0, 1). Defaults to 0.5.
        delta (float): Share of the training after which pruning stops, in (0, 1]. Defaults to 1: full passes at the end
            of a decayed schedule cost visits where the rate is nothing (0.875 was worse, see docs/results.md).
        pi_min (float): Smallest chance of a sample, in (0, 1]: no visit stands for more than ``1 / pi_min``. Defaults
            to 0.1.
        options: ``target_saving``, ``min_worth``, ``rescale``, ``keep``, ``lr_rule`` as :class:`.AnnealedPolicy` takes
            them.

    Raises:
        ValueError: If an argument is out of its range, or ``pi_min`` leaves no room for the ratio.
    """

    name = "variance"
    score = "gradient"
    floor = "the smallest chance of a visit"

    def __init__(self, prune_ratio: float = 0.5, delta: float = 1.0, pi_min: float = PI_MIN, **options: Any) -> None:
        super().__init__(prune_ratio, delta, pi_min, **options)

    def sizes(self, scores: np.ndarray, where: np.ndarray) -> np.ndarray:
        return scores.astype(np.float64)
