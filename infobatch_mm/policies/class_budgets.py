"""Visits shared out over classes, more of them to classes of high loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..core.annealed import PI_MIN
from ..core.chances import Chances
from ..core.policy import Snapshot
from ..core.policy_registry import register_policy
from .arguments import classes_in
from .proportional import ProportionalPolicy


@register_policy
class ClassBudgetsPolicy(ProportionalPolicy):
    """Shares the visits of a pass out over the classes, each class a floor, and draws them at random within a class.

    After RCAP (Hassan et al., UAI 2025): a class of the share p of the samples and the mean loss l gets visits in
    proportion to ``sqrt(p l)``, as many as it has at most. Its samples are visited with that chance and weigh the
    inverse, so it is unbiased. RCAP prefers high losses within a class, by a softmax of clipped losses, and does not
    weigh: it is not unbiased. The floor is an addition. Samples without a score are visited.

    Args:
        classes (str | Sequence[int]): Class of each sample, whole numbers: a ``.npy`` file of shape ``(N,)``, or the
            numbers themselves, which are then written into summaries and checkpoints.
        prune_ratio (float): Share of its visits that a pass saves, in [0, 1). Defaults to 0.5.
        delta (float): Share of the training after which pruning stops, in (0, 1]. Defaults to 0.875.
        pi_min (float): Floor of a class: smallest chance of its samples, in (0, 1]. Defaults to 0.1.
        options: As :class:`.AnnealedPolicy` takes them, but ``min_worth``.

    Raises:
        ValueError: If an argument is out of its range, the file cannot be read, or it is of another number of samples.
    """

    name = "class_budgets"
    floor = "the smallest chance of a sample of a class"

    def __init__(
        self, classes: Any, prune_ratio: float = 0.5, delta: float = 0.875, pi_min: float = PI_MIN, **options: Any
    ) -> None:
        super().__init__(prune_ratio, delta, pi_min, **options)
        if self.min_worth is not None:  # which is looked up on a part of the samples, whose classes are not known
            raise ValueError(f"min_worth={self.min_worth} and policy='class_budgets': say how much by prune_ratio")
        self._classes = classes_in(classes)
        self.classes = str(classes) if isinstance(classes, (str, Path)) else self._classes.tolist()

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "classes": self.classes}

    def chances_at(self, snapshot: Snapshot, ratio: float) -> Chances | None:
        if (num_samples := len(snapshot.seen)) != len(self._classes):
            raise ValueError(
                f"classes names the class of {len(self._classes)} samples, this data set has {num_samples}: give one "
                "for each, in their order"
            )
        return super().chances_at(snapshot, ratio)

    def sizes(self, scores: np.ndarray, where: np.ndarray) -> np.ndarray:
        number, sizes = np.unique(self._classes[where], return_inverse=True, return_counts=True)[1:]
        losses = np.bincount(number, scores) / sizes
        return np.sqrt(losses / sizes)[number]
