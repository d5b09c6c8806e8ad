"""Chances in proportion to gradients: the unbiased pruning of the smallest variance."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..core.annealed import PI_MIN, AnnealedPolicy
from ..core.chances import Chances
from ..core.checks import is_number, plain, what_is_wrong
from ..core.policy import Snapshot
from ..core.policy_registry import register_policy
from ..core.systematic import proportional


@register_policy
class VariancePolicy(AnnealedPolicy):
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
    needs_scores = True
    score = "gradient"

    def __init__(self, prune_ratio: float = 0.5, delta: float = 1.0, pi_min: float = PI_MIN, **options: Any) -> None:
        super().__init__(prune_ratio, delta, **options)
        if not is_number(pi_min) or not 0 < plain(pi_min) <= 1:
            raise ValueError(
                f"pi_min={pi_min!r} {what_is_wrong(pi_min, '(0, 1]')}: it is the smallest chance of a visit; use 0.1"
            )
        self.pi_min = float(pi_min)
        if self.target_saving is None and self.min_worth is None and 1 - self.prune_ratio < self.pi_min:
            raise ValueError(
                f"prune_ratio={self.prune_ratio} would visit a share of {1 - self.prune_ratio:.3g}, below the smallest "
                f"chance pi_min={self.pi_min}: lower one of them"
            )

    @property
    def largest_ratio(self) -> float:
        return 1 - self.pi_min

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "pi_min": self.pi_min}

    def chances_at(self, snapshot: Snapshot, ratio: float) -> Chances | None:
        where = np.flatnonzero(snapshot.seen.numpy())
        total = len(where) - ratio * len(snapshot.seen)  # what was never seen is visited
        if not len(where) or total >= len(where):
            return None
        norms = snapshot.scores.numpy()[where].astype(np.float64)
        chances = np.ones(len(snapshot.seen))
        chances[where] = proportional(norms.clip(min=0.0), max(total, self.pi_min * len(where)), self.pi_min)
        return Chances(torch.from_numpy(chances), lowest=self.pi_min)
