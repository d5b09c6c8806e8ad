"""The highest losses of a random pool."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.annealed import check_delta
from ..core.checks import is_number, plain
from ..core.plan import Plan, drawn_plan
from ..core.policy import PruningPolicy
from ..core.policy_registry import register_policy
from .arguments import checked_share


@register_policy
class OrderDpPolicy(PruningPolicy):
    """Draws a pool of the share s at random, and visits the share q of it with the highest losses.

    OrderDP (Jin et al., ICLR 2026, arXiv 2606.08574). A pass saves exactly 1 - s q, but for full batches. No weights,
    no annealing. The paper's "unbiased" is for a surrogate loss, in which the j-th largest loss counts by the chance
    that it is visited (Theorem 1); for the loss itself it is not unbiased. Difference: samples without a score are
    visited.

    Args:
        pool (float): s, in (0, 1]. Defaults to 0.5.
        top (float): q, in (0, 1]. Defaults to 0.6.
        prune_ratio (float, optional): Share of its visits that a pass saves, from 1 - s to 1; takes the place of
            ``top``.
        delta (float): Share of the training after which pruning stops, in (0, 1]. Defaults to 1.

    Raises:
        ValueError: If an argument is out of its range, or the pool is too small for the ratio.
    """

    name = "orderdp"
    needs_scores = True
    unbiased = False

    def __init__(
        self, pool: float = 0.5, top: float = 0.6, prune_ratio: float | None = None, delta: float = 1.0
    ) -> None:
        self.pool = checked_share("pool", pool, "the share of the samples that a pass chooses from; use 0.5", "(0, 1]")
        if prune_ratio is not None:
            if top != 0.6:
                raise ValueError(f"prune_ratio={prune_ratio!r} and top={top!r}: both say how much; give one of them")
            if not is_number(prune_ratio) or not 1 - self.pool <= plain(prune_ratio) < 1:
                raise ValueError(
                    f"prune_ratio={prune_ratio!r} is outside [{1 - self.pool:.3g}, 1): a pool of {self.pool:.3g} saves "
                    "that much by itself; raise pool, up to 1"
                )
            top = (1 - float(prune_ratio)) / self.pool
        self.top = checked_share("top", top, "the share of the pool that is visited; use 0.6", "(0, 1]")
        check_delta(delta)
        self.delta = float(delta)

    def is_active(self, progress: float) -> bool:
        return self.pool * self.top < 1 and progress < self.delta - 1e-9

    def settings(self) -> dict[str, Any]:
        return {"policy": self.name, "pool": self.pool, "top": self.top, "delta": self.delta}

    def draw(self, scores: Tensor, seen: Tensor, generator: torch.Generator, multiple_of: int) -> Plan | None:
        where, unseen = np.flatnonzero(seen.numpy()), np.flatnonzero(~seen.numpy())
        num_pool = round(self.pool * len(where))
        target = self.top * self.pool * len(where)
        lower = math.floor((len(unseen) + target) / multiple_of + 1e-9) * multiple_of - len(unseen)
        fitting = [count for count in (lower, lower + multiple_of) if 1 <= count <= num_pool]
        num_visits = min(fitting, key=lambda count: abs(count - target), default=len(where))
        if num_visits == len(where):
            return None
        pool = where[torch.randperm(len(where), generator=generator, device="cpu")[:num_pool].numpy()]
        highest = np.argpartition(scores.numpy()[pool], num_pool - num_visits)[num_pool - num_visits :]
        return drawn_plan(unseen, pool[highest], np.ones(num_visits), generator)
