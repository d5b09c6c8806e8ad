"""The last loss, and whether it was above the mean of the batch that it was in."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..core.distributed import Group
from ..core.score_rule import Columns, register_score
from .bls import batch_mean
from .deferred import DeferredScore
from .raw import RawScore


@register_score
class WindowScore(DeferredScore):
    """The last loss of a sample, compared with the other ones of its batch, for the policy ``'repb'``.

    Losses of one batch are of one state of the model, so they can be compared: the local window of RePB (Zhou et al.,
    ICLR 2026) with its width of one batch. A batch is what one process hands over in one call.

    Args:
        score_ema (float): Only 0, which is no average. Defaults to 0.
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.

    Columns:
        above (Tensor): Whether a sample was visited in the last pass, with a loss that was not below its batch's mean,
            shape ``(N,)``, bool.
        passes (Tensor): Number of passes that visited it, shape ``(N,)``, int32.

    Raises:
        ValueError: For another ``score_ema``.
    """

    name = "window"
    KEPT: ClassVar = {"above": torch.bool, "passes": torch.int32}

    def __init__(self, score_ema: float = 0.0, group: Group = None) -> None:
        super().__init__(group)
        if score_ema:
            raise ValueError(f"score='window' and score_ema={score_ema!r} contradict each other: it is the last loss")
        self._above: np.ndarray = np.zeros(0, dtype=bool)

    def evidence(self, losses: Tensor, log_snr: Tensor | None) -> Tensor:
        return batch_mean(losses)

    def settle(self) -> tuple[Tensor, Tensor]:
        indices, losses, means = self._held.take()
        self._above = (losses >= means).numpy()  # of the visits that fold() gets next
        return indices, losses

    def fold(self, columns: Columns, where: np.ndarray, losses: np.ndarray) -> None:
        self.make_kept(len(columns.values))
        RawScore().fold(columns, where, losses)
        above = self._kept["above"].numpy()
        above[:] = False
        above[where] = self._above
        self._kept["passes"].numpy()[where] += 1  # numpy adds once, however often a sample comes
