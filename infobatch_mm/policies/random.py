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

    Args: as :class:`.AnnealedPolicy`; ``prune_ratio`` is the chance r that a sample is skipped.
    """

    name = "random"

    def chances_at(self, snapshot: Snapshot, ratio: float) -> Thinning:
        return Thinning(torch.ones_like(snapshot.seen), ratio)
