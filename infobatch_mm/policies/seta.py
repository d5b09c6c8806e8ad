"""A window of groups of like losses, which slides from easy to hard."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..core.annealed import check_delta, check_ratio
from ..core.chances import Chances
from ..core.checks import whole_number
from ..core.policy import PruningPolicy, Snapshot
from ..core.policy_registry import register_policy
from .arguments import checked_share
from .groups import groups_of
from .unweighted import unweighted


@register_policy
class SetaPolicy(PruningPolicy):
    """Visits a random share of the samples whose loss lies in a window that slides from easy to hard, again and again.

    SeTa (Zhou et al., CVPR 2025): a share r is left out at random, the rest is parted into k groups by k-means on the
    losses, and the pass with number n visits the ``w = ceil(alpha k)`` groups from ``n mod (k - w + 1)`` on. Towards
    the end it visits a random share 1-r of all (partial annealing). No weights: not unbiased. Differences: groups are
    made of all samples rather than of the random share, which is the same but for its noise; k-means begins with
    quantiles, so that it repeats; the first pass is full, because it has no scores. The paper's code rounds ``alpha k``
    to the nearest.

    Args:
        prune_ratio (float): Share r that is left out at random, in [0, 1). Defaults to 0.1.
        delta (float): Share of the training after which the window is dropped, in (0, 1]. Defaults to 0.875.
        num_groups (int): Number k of groups, at least 1. Defaults to 10.
        window (float): Share alpha of the groups in the window, in (0, 1]. Defaults to 0.5.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "seta"
    needs_scores = True
    unbiased = False

    def __init__(
        self, prune_ratio: float = 0.1, delta: float = 0.875, num_groups: int = 10, window: float = 0.5
    ) -> None:
        check_ratio(prune_ratio)
        check_delta(delta)
        self.prune_ratio, self.delta = float(prune_ratio), float(delta)
        self.num_groups = whole_number("num_groups", num_groups, 1, "it is the number of groups of like losses; use 10")
        self.window = checked_share("window", window, "the share of the groups that a pass visits; use 0.5", "(0, 1]")

    def is_active(self, progress: float) -> bool:
        return True

    def settings(self) -> dict[str, Any]:
        return {
            "policy": self.name,
            "prune_ratio": self.prune_ratio,
            "delta": self.delta,
            "num_groups": self.num_groups,
            "window": self.window,
        }

    def chances(self, snapshot: Snapshot) -> Chances | None:
        seen = snapshot.seen.numpy()
        if not seen.any():
            return None
        chances = np.where(seen, 1 - self.prune_ratio, 1.0)
        if snapshot.progress < self.delta - 1e-9:
            width = math.ceil(self.window * self.num_groups - 1e-9)
            first = snapshot.pass_index % (self.num_groups - width + 1)
            groups = groups_of(snapshot.scores.numpy()[seen], self.num_groups)
            chances[seen] *= (groups >= first) & (groups < first + width)
        return unweighted(chances, seen)
