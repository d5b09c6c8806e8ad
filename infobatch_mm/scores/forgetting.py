"""How often a sample was learned and forgotten again."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch

from ..core.checks import is_number, plain
from ..core.distributed import Group
from ..core.score_rule import register_score
from .deferred import BySampleScore


@register_score
class ForgettingScore(BySampleScore):
    """Counts the forgetting events of a sample (Toneva et al., ICLR 2019): learned at one visit, not at the next.

    A cross-entropy below log 2 is a probability above one half, so the sample is classified correctly for certain. In
    problems of more than two classes some samples above it are correct as well: this counts a little more strictly
    than the paper. A sample that was never learned counts as forgotten at each visit, which no other reaches; in the
    paper it has infinitely many events.

    Args:
        learned_below (float): Loss below which a sample counts as learned, above 0. Defaults to log 2.
        score_ema (float): Only 0, which is no average. Defaults to 0.
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.

    Raises:
        ValueError: If ``learned_below`` is not above 0, or for another ``score_ema``.
    """

    name = "forgetting"
    KEPT: ClassVar = {"learned": torch.bool, "ever": torch.bool, "events": torch.int32}

    def __init__(self, learned_below: float = math.log(2), score_ema: float = 0.0, group: Group = None) -> None:
        super().__init__(group)
        if score_ema:
            raise ValueError(f"score='forgetting' and score_ema={score_ema!r} contradict each other: it is a count")
        if not is_number(learned_below) or plain(learned_below) <= 0:
            raise ValueError(
                f"learned_below={learned_below!r} is no number above 0: it is the loss below which a sample counts as "
                "learned; leave it out for log 2, a probability of one half"
            )
        self.learned_below = float(learned_below)

    def norms(self, scores: np.ndarray) -> None:
        return None

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "learned_below": self.learned_below}

    def scored(self, at: np.ndarray, losses: np.ndarray, times: np.ndarray) -> np.ndarray:
        learned, ever, events = (self._kept[name].numpy() for name in self.KEPT)
        now = losses < self.learned_below
        events[at] += learned[at] & ~now
        learned[at] = now
        ever[at] |= now
        return np.where(ever[at], events[at], times)
