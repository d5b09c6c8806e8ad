"""An upper bound of a sample's loss: its average and how much it varies."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from ..core.checks import is_number, plain
from ..core.distributed import Group
from ..core.score_rule import register_score
from .deferred import BySampleScore, at_most_largest
from .ema import DEFAULT_EMA


@register_score
class UcbScore(BySampleScore):
    """``E + c * V``: the moving averages of a sample's loss, and of its squared distance from that average.

    Raju et al., 2021 (arXiv 2111.12621): ``V <- a V + (1-a) (loss - E)**2``, then ``E <- a E + (1-a) loss``. Both are
    corrected for their beginning here, as in :class:`.EmaScore`: a first loss is the average, and has no distance.

    Args:
        confidence (float): c, at least 0. Defaults to 1.
        score_ema (float): Decay a of both averages, in [0, 1). Defaults to 0.9.
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.

    Raises:
        ValueError: If ``confidence`` is negative or no number.
    """

    name = "ucb"
    KEPT: ClassVar = {"mean": torch.float32, "variance": torch.float32}

    def __init__(self, confidence: float = 1.0, score_ema: float = DEFAULT_EMA, group: Group = None) -> None:
        super().__init__(group)
        if not is_number(confidence) or plain(confidence) < 0:
            raise ValueError(
                f"confidence={confidence!r} is no number from 0 on: it is what the variance of a loss counts beside "
                "its average; use 1"
            )
        self.confidence = float(confidence)
        self.score_ema = float(score_ema)

    def norms(self, scores: np.ndarray) -> None:
        return None

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "confidence": self.confidence}

    def scored(self, at: np.ndarray, losses: np.ndarray, times: np.ndarray) -> np.ndarray:
        mean, variance = self._kept["mean"].numpy(), self._kept["variance"].numpy()
        gap = losses - mean[at]
        varies = variance[at] + self._share(times - 1) * (gap**2 - variance[at])
        variance[at] = at_most_largest(np.where(times > 1, varies, 0.0))
        mean[at] += self._share(times) * gap
        return mean[at] + self.confidence * variance[at].astype(np.float64)

    def _share(self, times: np.ndarray) -> np.ndarray:
        """What the newest of so many values counts in their average."""
        times = np.maximum(times, 1)
        return (1 - self.score_ema) / (1 - self.score_ema**times)
