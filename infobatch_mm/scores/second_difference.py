"""How much the course of a sample's loss bends: small where it was learned, or cannot be."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from ..core.checks import whole_number
from ..core.distributed import Group
from ..core.score_rule import register_score
from .deferred import BySampleScore


@register_score
class SecondDifferenceScore(BySampleScore):
    """The mean of the last ``|l(t) - 2 l(t-1) + l(t-2)|`` of a sample, over its visits.

    Instance-dependent Early Stopping (Yuan et al., ICLR 2025) calls a sample mastered where it stays small. Losses
    before the first count as 0, so a sample has a large one until it was visited as often as it takes.

    Args:
        differences (int): How many of them the mean is over, at least 1. Defaults to 3, as in the paper's code.
        score_ema (float): Only 0, which is no average. Defaults to 0.
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.

    Raises:
        ValueError: If ``differences`` is no whole number from 1 on, or for another ``score_ema``.
    """

    name = "second_difference"
    KEPT: ClassVar = {"losses": torch.float32}  # the last ones, the newest at the end

    def __init__(self, differences: int = 3, score_ema: float = 0.0, group: Group = None) -> None:
        super().__init__(group)
        if score_ema:
            raise ValueError(
                f"score='second_difference' and score_ema={score_ema!r} contradict each other: it is a mean of "
                f"differences={differences!r} second differences, and no moving average"
            )
        meaning = "it is the number of second differences that the score is the mean of; use 3"
        self.differences = whole_number("differences", differences, 1, meaning)

    def norms(self, scores: np.ndarray) -> None:
        return None

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "differences": self.differences}

    def kept_shape(self, name: str) -> tuple[int, ...]:
        return (self.differences + 2,)

    def scored(self, at: np.ndarray, losses: np.ndarray, times: np.ndarray) -> np.ndarray:
        course = np.concatenate([self._kept["losses"].numpy()[at, 1:], losses[:, None]], 1)
        self._kept["losses"].numpy()[at] = course
        return np.abs(np.diff(course, 2, 1)).mean(1)
