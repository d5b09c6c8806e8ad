"""Chances in proportion to what a policy makes of the scores, with a floor."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch

from ..core.annealed import PI_MIN, AnnealedPolicy
from ..core.chances import Chances
from ..core.policy import Snapshot
from ..core.systematic import proportional
from .arguments import checked_share


class ProportionalPolicy(AnnealedPolicy):
    """Visits samples with a chance in proportion to a size, and weighs them by the inverse; unseen ones for certain.

    A policy writes :meth:`sizes`.

    Args:
        prune_ratio (float): Share of its visits that a pass saves, in [0, 1). Defaults to 0.5.
        delta (float): Share of the training after which pruning stops, in (0, 1]. Defaults to 0.875.
        pi_min (float): Smallest chance of a sample, in (0, 1]. Defaults to 0.1.
        options: As :class:`.AnnealedPolicy` takes them.

    Raises:
        ValueError: If an argument is out of its range, or ``pi_min`` leaves no room for the ratio.
    """

    needs_scores = True
    #: What ``pi_min`` is, for a message.
    floor: ClassVar[str]

    def __init__(self, prune_ratio: float = 0.5, delta: float = 0.875, pi_min: float = PI_MIN, **options: Any) -> None:
        super().__init__(prune_ratio, delta, **options)
        self.pi_min = checked_share("pi_min", pi_min, f"{self.floor}; use 0.1", "(0, 1]")
        if self.target_saving is None and self.min_worth is None and 1 - self.prune_ratio < self.pi_min:
            raise ValueError(
                f"prune_ratio={self.prune_ratio} would visit a share of {1 - self.prune_ratio:.3g}, below the smallest "
                f"chance pi_min={self.pi_min}: lower one of them"
            )

    @abstractmethod
    def sizes(self, scores: np.ndarray, where: np.ndarray) -> np.ndarray:
        """What chances are in proportion to.

        Args:
            scores (ndarray): Scores of the samples that have one, shape ``(n,)``, float32, none negative.
            where (ndarray): Which samples these are, shape ``(n,)``, int64.

        Returns:
            ndarray: Shape ``(n,)``, float64, none negative.
        """

    @property
    def largest_ratio(self) -> float:
        return 1 - self.pi_min

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "pi_min": self.pi_min}

    def chances_at(self, snapshot: Snapshot, ratio: float) -> Chances | None:
        seen = snapshot.seen.numpy()
        where = np.flatnonzero(seen)
        total = len(where) - ratio * len(seen)  # what was never seen is visited
        if not len(where) or total >= len(where):
            return None
        sizes = self.sizes(snapshot.scores.numpy()[where].clip(min=0.0), where)
        chances = np.ones(len(seen))
        chances[where] = proportional(sizes, max(total, self.pi_min * len(where)), self.pi_min)
        return Chances(torch.from_numpy(chances), lowest=self.pi_min)
