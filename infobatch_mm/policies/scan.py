"""The lowest and the highest losses left out, more and more in each cycle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..core.chances import Chances
from ..core.checks import whole_number
from ..core.policy import PruningPolicy, Snapshot
from ..core.policy_registry import register_policy
from .arguments import checked_share
from .unweighted import unweighted


@register_policy
class ScanPolicy(PruningPolicy):
    """Leaves out samples of the lowest and of the highest losses, a share that grows by a cosine and starts again.

    SCAN (Guo and Kankanhalli, ICCV 2025), for contrastive pre-training. In cycles of T + 1 passes: the first is full;
    in the e-th of the others the candidates, the share rho of the lowest losses (redundant) and of the highest
    (ill-matched), are left out with the chance ``(1 + cos((T - e) pi / T)) / 2``. Over a cycle it saves the share rho.
    No weights: not unbiased. Differences: candidates are ranked among all samples by their last loss before each pass,
    where the paper ranks within the batches of the cycle's full pass; the full passes at the beginning are counted,
    where the paper waits until the mean loss falls more slowly.

    Args:
        prune_ratio (float): rho, in (0, 0.5]. Defaults to 0.3.
        cycle (int): T, at least 1. Defaults to 3.
        warmup (int): Full passes before the first cycle, at least 0. Defaults to 1.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "scan"
    needs_scores = True
    unbiased = False

    def __init__(self, prune_ratio: float = 0.3, cycle: int = 3, warmup: int = 1) -> None:
        meaning = "the share of the samples at either end that may be left out, up to a half; use 0.3"
        self.prune_ratio = checked_share("prune_ratio", prune_ratio, meaning)
        if self.prune_ratio > 0.5:
            raise ValueError(f"prune_ratio={prune_ratio!r} is above 0.5: it is {meaning}")
        self.cycle = whole_number("cycle", cycle, 1, "it is the number of pruned passes after each full one; use 3")
        self.warmup = whole_number("warmup", warmup, 0, "it is the number of full passes at the beginning; use 1")

    def is_active(self, progress: float) -> bool:
        return True

    def settings(self) -> dict[str, Any]:
        own = {"prune_ratio": self.prune_ratio, "cycle": self.cycle, "warmup": self.warmup}
        return {"policy": self.name, **own}

    def chances(self, snapshot: Snapshot) -> Chances | None:
        seen = snapshot.seen.numpy()
        where = np.flatnonzero(seen)
        place = (snapshot.pass_index - self.warmup) % (self.cycle + 1)
        count = int(self.prune_ratio * len(where))
        if snapshot.pass_index < self.warmup or place == 0 or count == 0:
            return None
        order = np.argpartition(snapshot.scores.numpy()[where], (count - 1, len(where) - count))
        candidates = np.concatenate([order[:count], order[len(where) - count :]])
        chances = np.ones(len(seen))
        chances[where[candidates]] = (1 - math.cos((self.cycle - place) * math.pi / self.cycle)) / 2
        return unweighted(chances, seen)
