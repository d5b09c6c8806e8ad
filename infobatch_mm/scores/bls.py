"""The average loss of the batches that a sample was in."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..core.distributed import Group
from ..core.score_rule import Columns, register_score
from .deferred import DeferredScore
from .ema import DEFAULT_EMA, average


@register_score
class BatchLossScore(DeferredScore):
    """``s <- a s + (1-a) L``, L the mean loss of the batch that the sample was in (Zhou et al., CVPR 2026).

    For losses that come as one number for a batch; where they come by sample, as here, it shows what is lost. It takes
    many visits until a sample differs from those it met. A batch is what one process hands over in one call.
    Differences from the paper: the average is corrected for its beginning, where the paper begins with the first
    batch's loss.

    Args:
        score_ema (float): Decay a of the average over visits, in [0, 1). Defaults to 0.9.
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.
    """

    name = "bls"

    def __init__(self, score_ema: float = DEFAULT_EMA, group: Group = None) -> None:
        super().__init__(group)
        self.score_ema = float(score_ema)

    def evidence(self, losses: Tensor, log_snr: Tensor | None) -> Tensor:
        return batch_mean(losses)

    def settle(self) -> tuple[Tensor, Tensor]:
        indices, _, means = self._held.take()
        return indices, means

    def fold(self, columns: Columns, where: np.ndarray, losses: np.ndarray) -> None:
        average(columns, where, losses, self.score_ema)


def batch_mean(losses: Tensor) -> Tensor:
    """The mean of a batch's finite losses, as one for each sample, shape ``(B,)``, float32; 0 where none is finite."""
    losses = losses.detach().to(torch.float32)
    finite = torch.isfinite(losses)
    mean = torch.where(finite, losses, 0.0).sum() / finite.sum().clamp(min=1)
    return mean.expand(len(losses)).clone()
