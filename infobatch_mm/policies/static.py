"""One subset for the whole training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..core.annealed import check_ratio
from ..core.chances import Chances
from ..core.checks import whole_number
from ..core.policy import PruningPolicy, Snapshot
from ..core.policy_registry import register_policy
from .arguments import scores_at
from .unweighted import unweighted


@register_policy
class StaticPolicy(PruningPolicy):
    """Trains on a fixed part of the data: by chance, or by the scores that another run left behind.

    What the data-pruning literature compares with: keep the hardest by the scores of a warm-up run. EL2N (Paul et al.,
    NeurIPS 2021) ranks by ``score='gradient'`` at the outputs, GraNd (ibid.) by the same at the last layer, forgetting
    (Toneva et al., ICLR 2019) by ``score='forgetting'``. No weights: not unbiased. The warm-up run is a cost that the
    visits do not show.

    Args:
        prune_ratio (float): Share of the samples that are left out, in [0, 1). Defaults to 0.5.
        order (str): Which are kept: ``'random'``, ``'hardest'``, the highest scores, or ``'easiest'``. Defaults to
            ``'random'``.
        scores (str, optional): Where the scores are, in an order by scores: the directory of a run that left
            ``infobatch_scores.parquet`` or ``.npz``, one of these files, or a ``.npy`` of shape ``(N,)``. Samples
            without a score (NaN) are kept.
        subset (int): Seed of a random subset, from 0 on. Defaults to 0.

    Raises:
        ValueError: If an argument is out of its range, the scores cannot be found, or they are of another number of
            samples.
    """

    name = "static"
    unbiased = False

    def __init__(
        self, prune_ratio: float = 0.5, order: str = "random", scores: str | None = None, subset: int = 0
    ) -> None:
        check_ratio(prune_ratio)
        self.prune_ratio = float(prune_ratio)
        if order not in ("random", "hardest", "easiest"):
            raise ValueError(f"order={order!r}: use 'random', 'hardest' or 'easiest'")
        if (order == "random") != (scores is None):
            needed = "takes no scores" if order == "random" else "needs scores='...', what a run left behind"
            raise ValueError(f"order={order!r} and scores={scores!r}: this order {needed}")
        self.order = order
        self.scores = None if scores is None else str(scores)
        self.subset = whole_number("subset", subset, 0, "it is the seed of a random subset; use 0")
        self._ranks = None if self.scores is None else scores_at(Path(self.scores))

    def is_active(self, progress: float) -> bool:
        return self.prune_ratio > 0

    def settings(self) -> dict[str, Any]:
        own = {"subset": self.subset} if self.scores is None else {"scores": self.scores}
        return {"policy": self.name, "prune_ratio": self.prune_ratio, "order": self.order, **own}

    def chances(self, snapshot: Snapshot) -> Chances | None:
        num_samples = len(snapshot.seen)
        left_out = num_samples - round((1 - self.prune_ratio) * num_samples)
        if self._ranks is None:
            ranks = np.random.default_rng(self.subset).random(num_samples)
        else:
            ranks = -self._ranks if self.order == "easiest" else self._ranks
        if len(ranks) != num_samples:
            raise ValueError(
                f"scores={self.scores!r} holds {len(ranks)} scores, this data set has {num_samples} samples: give the "
                "scores of a run on the same data"
            )
        chances = np.ones(num_samples)
        if left_out:
            chances[np.argpartition(np.where(np.isnan(ranks), np.inf, ranks), left_out - 1)[:left_out]] = 0.0
        return unweighted(chances, np.ones(num_samples, dtype=bool))
