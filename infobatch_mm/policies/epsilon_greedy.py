"""The highest scores, and a few of the others by chance."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.annealed import AnnealedPolicy
from ..core.chances import Chances
from ..core.policy import Snapshot
from ..core.policy_registry import register_policy
from .arguments import checked_share
from .unweighted import unweighted


@register_policy
class EpsilonGreedyPolicy(AnnealedPolicy):
    """Visits the samples of the highest scores, and a share of its visits at random among the others.

    Raju et al., 2021 (arXiv 2111.12621): of the (1-r) N visits of a pass, (1-epsilon) go to the highest moving averages
    of the loss, the rest is drawn uniformly from what is left. No weights, no annealing: not unbiased. Differences:
    the paper keeps a choice for several passes, here each pass chooses again; samples without a score are visited.

    Args:
        prune_ratio (float): Share r of its visits that a pass saves, in [0, 1). Defaults to 0.5.
        delta (float): Share of the training after which pruning stops, in (0, 1]. Defaults to 1.
        epsilon (float): Share of the visits that are drawn at random, in [0, 1]. Defaults to 0.1.
        target_saving (float, optional): As :class:`.AnnealedPolicy` takes it.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "epsilon_greedy"
    needs_scores = True
    unbiased = False
    score = "ema"

    def __init__(
        self,
        prune_ratio: float = 0.5,
        delta: float = 1.0,
        epsilon: float = 0.1,
        *,
        target_saving: float | None = None,
    ) -> None:
        super().__init__(prune_ratio, delta, target_saving=target_saving)
        meaning = "the share of a pass's visits that are drawn at random; use 0.1"
        self.epsilon = checked_share("epsilon", epsilon, meaning, "[0, 1]")

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "epsilon": self.epsilon}

    def chances_at(self, snapshot: Snapshot, ratio: float) -> Chances | None:
        return greedy(snapshot, ratio, self.epsilon)


def greedy(snapshot: Snapshot, ratio: float, epsilon: float) -> Chances | None:
    """Chances of 1 for the highest scores, and equal ones for the others.

    Args:
        snapshot (Snapshot): What is known of the samples.
        ratio (float): Share of its visits that the pass saves.
        epsilon (float): Share of the visits that are drawn among the others.
    """
    seen = snapshot.seen.numpy()
    where = np.flatnonzero(seen)
    visits = max(0.0, len(where) - ratio * len(seen))  # what was never seen is visited
    if not len(where) or visits >= len(where):
        return None
    num_top = round((1 - epsilon) * visits)
    others = where
    if num_top:
        others = where[np.argpartition(snapshot.scores.numpy()[where], len(where) - num_top)[: len(where) - num_top]]
    chances = np.ones(len(seen))
    chances[others] = max(0.0, visits - num_top) / len(others) if epsilon else 0.0
    return unweighted(chances, seen)
