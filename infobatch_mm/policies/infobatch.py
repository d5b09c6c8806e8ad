"""InfoBatch: soft pruning below the mean score."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.annealed import AnnealedPolicy
from ..core.chances import Thinning
from ..core.checks import is_number, what_is_wrong
from ..core.policy import Snapshot
from ..core.policy_registry import register_policy


@register_policy
class InfoBatchPolicy(AnnealedPolicy):
    """InfoBatch (Qin et al., ICLR 2024): soft pruning below the mean score, rescaling, annealing.

    A sample whose last loss is below the mean of all seen samples is well learned and skipped with
    probability ``prune_ratio`` (eq. 3); the kept ones weigh n/k (eq. 6). After the share ``delta`` of
    the training every sample is visited (annealing). Differences from the reference code: the draw is of
    an exact count with its true inverse inclusion probability as weight, unseen samples take no part in
    the mean and are never pruned.

    Args:
        prune_ratio (float): Chance r that a well-learned sample is skipped, in [0, 1). Defaults to 0.5.
        delta (float): Share of the training after which pruning stops, in (0, 1]. Defaults to 0.875.
        quantile (float, optional): Share of the seen samples, in (0, 1], that count as well learned: those with the
            lowest scores. A pass then saves ``quantile * prune_ratio`` of its visits, however scores are distributed,
            which makes scores comparable. Defaults to None: those below the mean, as in the paper.
        options: ``target_saving``, ``min_worth``, ``rescale``, ``keep``, ``lr_rule`` as :class:`.AnnealedPolicy` takes
            them.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "infobatch"
    needs_scores = True

    def __init__(
        self, prune_ratio: float = 0.5, delta: float = 0.875, quantile: float | None = None, **options: Any
    ) -> None:
        super().__init__(prune_ratio, delta, **options)
        if quantile is not None and (not is_number(quantile) or not 0 < quantile <= 1):
            raise ValueError(
                f"quantile={quantile!r} {what_is_wrong(quantile, '(0, 1]')}: it is the share of the samples that count "
                "as well learned; leave it out for the ones below the mean score"
            )
        self.quantile = None if quantile is None else float(quantile)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **({} if self.quantile is None else {"quantile": self.quantile})}

    def chances_at(self, snapshot: Snapshot, ratio: float) -> Thinning | None:
        if not snapshot.seen.any():
            return None
        return Thinning(*self._well_learned(snapshot, ratio))

    def ratio_for(self, snapshot: Snapshot, saving: float) -> float:
        if not snapshot.seen.any():
            return 0.0
        candidates = self._well_learned(snapshot, 0.0)[0]
        return saving * len(candidates) / max(1, int(candidates.count_nonzero()))

    def _well_learned(self, snapshot: Snapshot, ratio: float) -> tuple[Tensor, float, float | None]:
        """Which samples are, shape ``(N,)``, bool; the ratio; and the score below which they are."""
        scores, seen = snapshot.scores, snapshot.seen
        if self.quantile is not None:
            candidates, bound = _lowest(scores, seen, self.quantile)
            return candidates, ratio, bound
        threshold = float(np.mean(scores.numpy(), where=seen.numpy(), dtype=np.float64))
        return (scores < threshold) & seen, ratio, threshold


def _lowest(scores: Tensor, seen: Tensor, quantile: float) -> tuple[Tensor, float | None]:
    """Which samples are the given share of the seen ones with the lowest scores, and the lowest score above them."""
    where = np.flatnonzero(seen.numpy())
    count = round(quantile * len(where))
    candidates = torch.zeros_like(seen)
    if count == len(where):
        candidates.copy_(seen)
        return candidates, None
    order = np.argpartition(scores.numpy()[where], count)  # exactly so many, also of equal scores
    candidates.numpy()[where[order[:count]]] = True
    return candidates, float(scores[where[order[count]]])
