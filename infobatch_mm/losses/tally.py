"""The scores that the losses of a batch add up to, and what is known to be wrong with them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.devices import moved


class Tally:
    """Scores of the rows that stand for samples; nothing in it waits for a device.

    Attributes:
        scored (tuple, optional): Sum of the losses that count, shape ``(B,)``, float32, and which rows have a valid
            pixel in any of them, shape ``(B,)``, bool; None before the first loss that counts.
        broken (Tensor, optional): Rows in which a loss that is trained on is NaN or infinite, whether it counts in the
            score or not, shape ``(B,)``, bool; None before the first loss.
    """

    def __init__(self) -> None:
        self.scored: tuple[Tensor, Tensor] | None = None
        self.broken: Tensor | None = None

    def add(self, mean_loss: Tensor, valid: Tensor | None = None) -> None:
        """Add one loss to the scores; see :meth:`.TrainingStep.score`."""
        if valid is None:
            valid = torch.ones_like(mean_loss, dtype=torch.bool)
        valid = moved(valid, mean_loss.device)
        mean_loss = torch.where(valid, mean_loss.detach().float(), 0.0)
        if self.scored is None:
            self.scored = mean_loss, valid
        else:
            scores, any_valid = self.scored
            self.scored = scores + mean_loss, any_valid | valid

    def distrust(self, broken: Tensor) -> None:
        """Mark the rows, shape ``(B,)``, bool, in which a loss that is trained on is NaN or infinite."""
        self.broken = broken if self.broken is None else self.broken | moved(broken, self.broken.device)

    def take_rows(self, rows: Tally, places_of: Callable[[int], Tensor], size: int) -> None:
        """Add the tally of rows that stood in for the samples: a sample's score is the mean over its rows.

        Args:
            rows (Tally): The tally of the rows.
            places_of (Callable): ``places_of(number)`` gives the place in the batch of each row's sample, int64.
            size (int): Number of samples.
        """
        known = rows.broken if rows.scored is None else rows.scored[0]
        if known is None:
            return
        places = places_of(len(known))

        def added(values: Tensor) -> Tensor:
            none = torch.zeros(size, dtype=torch.float32, device=values.device)
            return none.index_add(0, moved(places, values.device), values.float())

        if rows.scored is not None:
            scores, valid = rows.scored
            numbers = added(valid)
            self.add(added(scores) / numbers, numbers > 0)
        if rows.broken is not None:
            self.distrust(added(rows.broken) > 0)

    def result(self) -> tuple[Tensor, Tensor] | None:
        """Scores and which of them are valid, NaN where a loss that is trained on is not finite; None before any."""
        if self.scored is None or self.broken is None:
            return self.scored
        scores, valid = self.scored
        broken = moved(self.broken, scores.device) & valid
        return torch.where(broken, torch.nan, scores), valid


def divided(scores: Tensor, valid: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Divide the scores of mixed images among the samples in them.

    Args:
        scores (Tensor): Of the images, shape ``(B,)``, float32.
        valid (Tensor): Which images have a score, shape ``(B,)``, bool.
        shares (Tensor): Share of each sample (column) in each image (row), shape ``(B, B)``.

    Returns:
        tuple: Scores of the samples, and which of them are valid.
    """
    shares = torch.where(valid[:, None], shares.to(scores), 0.0)
    total = shares.sum(0)
    # No product with what a sample has no share in: 0 times NaN is NaN.
    parts = torch.where(shares > 0, shares * scores[:, None], 0.0)
    return parts.sum(0) / total, total > 0
