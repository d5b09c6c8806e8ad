"""The rows that a loss is computed over: the samples of a batch, some of them, or their parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.devices import moved
from .tally import Tally


class Rows:
    """The weights of the rows, and what losses leave behind for each of them.

    Args:
        weights (Tensor): Of the rows, shape ``(R,)``, float32; or of their samples, where counts are given.
        counts (Tensor, optional): Number of consecutive rows of each sample, shape ``(B,)``, int64, while it is not
            known how many rows there are in all. Defaults to None: a weight for each row.
        data_samples (Sequence, optional): The data samples of the rows, in their order. Defaults to None: not known.
        blank_factor (float): See :meth:`.TrainingStep.begin`. Defaults to 1.

    Attributes:
        weights (Tensor): As given, on whatever device they were needed last.
        tally (Tally): Scores of the rows so far.
    """

    def __init__(
        self,
        weights: Tensor,
        counts: Tensor | None = None,
        data_samples: Sequence[Any] | None = None,
        blank_factor: float = 1.0,
    ) -> None:
        self.weights = weights
        self.data_samples = data_samples
        self.blank_factor = blank_factor
        self.tally = Tally()
        self._counts = counts

    @property
    def number(self) -> int:
        """Number of rows."""
        if self._counts is not None:  # only a loss that is evaluated on each row alone asks before it is called
            self.expect(int(self._counts.sum()))
        return self.weights.numel()

    @property
    def weights_within(self) -> Tensor:
        """The weights for rows that stand in for these.

        Losses over some of the samples, or over their parts, are divided by the number of those rows, which are as many
        as valid samples or parts are in the batch: the factor for blank samples is in these weights.
        """
        return self.weights if self.blank_factor == 1 else self.weights * self.blank_factor

    def weights_on(self, device: torch.device) -> Tensor:
        """The weights, moved to a device once."""
        if self.weights.device != device:
            self.weights = moved(self.weights, device)
        return self.weights

    def expect(self, number: int) -> None:
        """Learn how many rows there are, if that is not known yet."""
        counts, self._counts = self._counts, None
        if counts is not None:
            self.weights = self.weights.repeat_interleave(counts, output_size=number)

    def distrust(self, broken: Tensor) -> None:
        """Mark rows in which a loss that is trained on is NaN or infinite; see :meth:`.TrainingStep.distrust`."""
        self.tally.distrust(broken if broken.dim() else broken.expand(self.number))
