"""The lowest losses hidden, where the prediction is right and confident."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.annealed import check_ratio
from ..core.policy import Snapshot
from ..core.policy_registry import register_policy
from .arguments import checked_share
from .hiding import HidingPolicy

#: Shares of the training, and what the hidden fraction is multiplied by from there on.
_DECAY = ((0.0, 1.0), (0.3, 0.8), (0.6, 0.6), (0.8, 0.4))


@register_policy
class KakurenboPolicy(HidingPolicy):
    """Hides the share F of the samples with the lowest losses, as far as they are predicted correctly and confidently.

    KAKURENBO (Nguyen et al., NeurIPS 2023). Of the F N lowest losses, the samples that are wrong or whose confidence is
    below tau are moved back. With a cross-entropy, ``exp(-loss) >= tau`` says both for tau from one half on. F is
    multiplied by 1, 0.8, 0.6 and 0.4 from 0, 30, 60 and 80 % of the training on. The learning rate is multiplied by
    1 / (1-F): here all visits weigh that, which is the same under SGD and nothing under Adam. Not unbiased.

    Differences: the forward pass that scores hidden samples again is a visit here, see :class:`.HidingPolicy`, so that
    only F (1 - 1 / ``rescore_every``) is hidden at most, and that is the F of the learning rate. Samples that do not
    fill a batch are left out at random.

    Args:
        prune_ratio (float): Largest share F of hidden samples, in [0, 1). Defaults to 0.3.
        delta (float): Share of the training after which nothing is hidden, in (0, 1]. Defaults to 1.
        tau (float): Least confidence of a hidden sample, in [0.5, 1). Defaults to 0.7.
        rescore_every (int): As :class:`.HidingPolicy` takes it. Defaults to 2.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "kakurenbo"

    def __init__(self, prune_ratio: float = 0.3, delta: float = 1.0, tau: float = 0.7, rescore_every: int = 2) -> None:
        super().__init__(delta, rescore_every)
        check_ratio(prune_ratio)
        self.prune_ratio = float(prune_ratio)
        meaning = "the least confidence of a hidden sample; use 0.7"
        self.tau = checked_share("tau", tau, meaning)
        if self.tau < 0.5:
            raise ValueError(f"tau={self.tau} is below 0.5, where a loss does not tell a correct prediction; use 0.7")

    def is_active(self, progress: float) -> bool:
        return self.prune_ratio > 0 and super().is_active(progress)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "prune_ratio": self.prune_ratio, "tau": self.tau}

    def learned(self, snapshot: Snapshot) -> np.ndarray:
        seen, losses = snapshot.seen.numpy(), snapshot.scores.numpy()
        where = np.flatnonzero(seen)
        num_lowest = min(int(self._fraction(snapshot.progress) * len(seen)), len(where))
        lowest: np.ndarray = np.zeros(len(seen), dtype=bool)
        if num_lowest:
            lowest[where[np.argpartition(losses[where], num_lowest - 1)[:num_lowest]]] = True
        return lowest & is_confident(losses, self.tau)

    def weight(self, snapshot: Snapshot) -> float:
        return 1 / (1 - self._fraction(snapshot.progress) * (1 - 1 / self.rescore_every))

    def _fraction(self, progress: float) -> float:
        """F at this point of the training."""
        factor = next(factor for start, factor in reversed(_DECAY) if progress >= start - 1e-9)
        return self.prune_ratio * factor


def is_confident(losses: np.ndarray, tau: float) -> np.ndarray:
    """Where a cross-entropy says that the true class has at least the probability tau."""
    return np.exp(-losses.astype(np.float64)) >= tau
