"""The scores that the losses of a batch add up to, and what is known to be wrong with them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.devices import moved


class Tally:
    """Scores of the rows that stand for samples; nothing in it waits for a device.

    Attributes:
        scores (Tensor, optional): Sum of the losses that count, shape ``(B,)``, float32; None before the first.
        valid (Tensor, optional): Which rows have a valid pixel in any of them, shape ``(B,)``, bool.
        broken (Tensor, optional): Rows of which a loss is trained on that is NaN or infinite, shape ``(B,)``, bool,
            whether it counts in the score or not.
    """

    def __init__(self) -> None:
        self.scores: Tensor | None = None
        self.valid: Tensor | None = None
        self.broken: Tensor | None = None

    def add(self, mean_loss: Tensor, valid: Tensor | None = None) -> None:
        """Add one loss to the scores; see :meth:`.LossWeigher.score`."""
        if valid is None:
            valid = torch.ones_like(mean_loss, dtype=torch.bool)
        valid = moved(valid, mean_loss.device)
        mean_loss = torch.where(valid, mean_loss.detach().float(), 0.0)
        if self.scores is None or self.valid is None:
            self.scores, self.valid = mean_loss, valid
        else:
            self.scores, self.valid = self.scores + mean_loss, self.valid | valid

    def distrust(self, broken: Tensor) -> None:
        """Learn of a loss that is trained on which rows it is NaN or infinite in, shape ``(B,)``, bool."""
        self.broken = broken if self.broken is None else self.broken | moved(broken, self.broken.device)

    def take_rows(self, rows: Tally, places: Tensor, size: int) -> None:
        """Add what rows came to that stood in for the samples: a sample's score is the mean over its rows.

        Args:
            rows (Tally): Theirs.
            places (Tensor): Place of each row's sample, int64.
            size (int): Number of samples.
        """

        def added(values: Tensor) -> Tensor:
            none = torch.zeros(size, dtype=torch.float32, device=values.device)
            return none.index_add(0, moved(places, values.device), values.float())

        if rows.scores is not None and rows.valid is not None:
            numbers = added(rows.valid)
            self.add(added(rows.scores) / numbers, numbers > 0)
        if rows.broken is not None:
            self.distrust(added(rows.broken) > 0)

    def result(self) -> tuple[Tensor, Tensor] | None:
        """Scores and which of them are valid; NaN where a loss is trained on that is not finite."""
        if self.scores is None or self.valid is None:
            return None
        if self.broken is None:
            return self.scores, self.valid
        broken = moved(self.broken, self.scores.device) & self.valid
        return torch.where(broken, torch.nan, self.scores), self.valid


def divided(scores: Tensor, valid: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of samples from those of the mixed images they have shares in, and which of them are valid."""
    shares = torch.where(valid[:, None], shares.to(scores), 0.0)
    total = shares.sum(0)
    # No product with what a sample has no share in: 0 times NaN is NaN.
    parts = torch.where(shares > 0, shares * scores[:, None], 0.0)
    return parts.sum(0) / total, total > 0
