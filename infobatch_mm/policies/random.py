"""Random pruning: the control that knows no scores."""

from __future__ import annotations

import torch

from ..core.annealed import AnnealedPolicy
from ..core.chances import Thinning
from ..core.policy import Snapshot
from ..core.policy_registry import register_policy


@register_policy
class RandomPolicy(AnnealedPolicy):
    """Random pruning with rescaling and annealing: the control that knows no scores.

    Every sample is skipped with probability ``prune_ratio``, whatever its loss, from the first pass on; the
    kept ones weigh n/k. RS2 (Okanovic et al., ICLR 2024) with InfoBatch's weights and annealing.

    Args:
        prune_ratio (float): Chance r that a sample is skipped, in [0, 1). Defaults to 0.5.
        delta (float): Share of the training after which pruning stops, in (0, 1]. Defaults to 0.875.
        target_saving, min_worth, rescale, keep, lr_rule: As :class:`.AnnealedPolicy` takes them.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "random"

    def chances_at(self, snapshot: Snapshot, ratio: float) -> Thinning:
        return Thinning(torch.ones_like(snapshot.seen), ratio)
