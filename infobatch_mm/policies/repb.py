"""Soft pruning below the mean of a batch, weighed by how often a sample was visited."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.annealed import AnnealedPolicy
from ..core.chances import Thinning
from ..core.plan import Plan
from ..core.policy import Snapshot
from ..core.policy_registry import register_policy


@register_policy
class RepbPolicy(AnnealedPolicy):
    """Skips with chance rho what was below its batch's mean in the last pass, and what was not visited there.

    RePB (Zhou et al., ICLR 2026). Losses are compared within a local window only, the batch, where the model is the
    same for all (``score='window'``). What was left out comes back with chance 1 - rho. A visit weighs E / n, n of the
    E passes so far having visited the sample, this one included: the inverse of how often it was visited. That tends to
    1/pi where chances stay what they are, but 1/n is not the inverse of the mean of n: not unbiased in one pass.
    ``weights='chances'`` is: the weights are the inverse of the chances then. Differences: full passes weigh 1; with
    another score than ``'window'`` losses are compared with the mean of all.

    Args:
        prune_ratio (float): rho, in [0, 1). Defaults to 0.5.
        delta (float): Share of the training after which pruning stops, in (0, 1]. Defaults to 1.
        weights (str): ``'counts'``, E / n as in the paper, or ``'chances'``, 1/pi. Defaults to ``'counts'``.
        target_saving (float, optional): As :class:`.AnnealedPolicy` takes it.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "repb"
    needs_scores = True
    score = "window"

    def __init__(
        self,
        prune_ratio: float = 0.5,
        delta: float = 1.0,
        weights: str = "counts",
        *,
        target_saving: float | None = None,
    ) -> None:
        super().__init__(prune_ratio, delta, target_saving=target_saving)
        if weights not in ("counts", "chances"):
            raise ValueError(f"weights={weights!r}: use 'counts', as in the paper, or 'chances', which is unbiased")
        self.weights = weights

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.weights == "chances"

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "weights": self.weights}

    def chances_at(self, snapshot: Snapshot, ratio: float) -> Thinning | None:
        candidates = self._candidates(snapshot)
        return Thinning(candidates, ratio) if bool(candidates.any()) else None

    def ratio_for(self, snapshot: Snapshot, saving: float) -> float:
        return saving * len(snapshot.seen) / max(1, int(self._candidates(snapshot).count_nonzero()))

    def plan(self, snapshot: Snapshot, generator: torch.Generator, multiple_of: int) -> Plan | None:
        plan = super().plan(snapshot, generator, multiple_of)
        if plan is None or self.weights == "chances":
            return plan
        passes = snapshot.columns.get("passes", snapshot.times_seen)[plan.indices]
        return replace(plan, weights=(snapshot.pass_index + 1) / (passes + 1).to(torch.float32))

    def _candidates(self, snapshot: Snapshot) -> Tensor:
        seen = snapshot.seen
        if "above" in snapshot.columns or not bool(seen.any()):
            return seen & ~snapshot.columns.get("above", seen)
        return seen & (snapshot.scores < float(np.mean(snapshot.scores.numpy(), where=seen.numpy(), dtype=np.float64)))
