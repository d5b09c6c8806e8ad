"""The weights of the batch in hand, and of the rows that stand in for its samples while a loss is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..core.devices import moved


class BatchInHand:
    """Weights of the samples of one batch; of mixed images or of pairs once it is known which samples are in them.

    Args:
        weights (Tensor): Shape ``(B,)``, float32.
        indices (Tensor, optional): Which samples these are, shape ``(B,)``, int64. Defaults to all different.
        pair_weights (Callable): Weights of losses that two samples share, from the weights of both.
        blank_factor (float): See :meth:`.LossWeigher.begin`.

    Attributes:
        size (int): Number B of samples.
        weights (Tensor): Of the rows that stand for samples now.
        shares (Tensor, optional): Share of each sample (column) in each image (row), shape ``(B, B)``; None where no
            image was mixed.
        blank_factor (float): For losses that are divided by the number of the batch's valid elements.
    """

    def __init__(
        self,
        weights: Tensor,
        indices: Tensor | None,
        pair_weights: Callable[[Tensor, Tensor], Tensor],
        blank_factor: float,
    ) -> None:
        self.size = len(weights)
        self.weights = self._sample_weights = weights
        self.shares: Tensor | None = None
        self.blank_factor = blank_factor
        self._indices, self._pair_weights = indices, pair_weights
        self._counts: Tensor | None = None  # rows of each sample, while it is not known how many there are in all

    @property
    def num_rows(self) -> int:
        """Number of samples, or of rows that stand in for them."""
        if self._counts is not None:  # only a loss that is evaluated on each row alone asks before it is called
            self.expect(int(self._counts.sum()))
        return self.weights.numel()

    def weights_on(self, device: torch.device) -> Tensor:
        """The weights, moved to a device once."""
        if self.weights.device != device:
            self.weights = moved(self.weights, device)
        return self.weights

    def mix(self, shares: Tensor) -> None:
        """Weigh mixed images from here on; see :meth:`.LossWeigher.mix`."""
        size = self.size
        if shares.shape != (size, size):
            raise ValueError(
                f"{len(shares)} images were mixed of {shares.shape[1]} samples in a batch of {size}: the weights of a "
                "batch that is mixed in part, or grows, are not known; mix all of it, or train without InfoBatchHook"
            )
        own = shares.diagonal()
        share, partner = (shares - own.diag()).max(dim=1)
        self.pair(torch.where(share > 0, partner, torch.arange(size, device=shares.device)))
        self.weights = torch.where(own > 0, self.weights, self._sample_weights[partner])
        self.shares = shares

    def pair(self, partner: Tensor) -> None:
        """Weigh pairs from here on; see :meth:`.LossWeigher.pair`."""
        weights = self._sample_weights = moved(self._sample_weights, partner.device)
        # A repeated sample can be paired with itself.
        names = torch.arange(self.size, device="cpu") if self._indices is None else self._indices
        names = moved(names, partner.device)
        paired = self._pair_weights(weights, weights[partner])
        self.weights = torch.where(names == names[partner], weights, paired)

    @contextmanager
    def with_rows(self, weights: Tensor, counts: Tensor | None) -> Iterator[None]:
        """Let other rows stand in for the samples.

        Their losses are divided by the number of rows: that of the valid samples of the batch, or of their parts.

        Args:
            weights (Tensor): Of the rows; or of the samples, where counts are given.
            counts (Tensor, optional): Number of consecutive rows of each sample, shape ``(B,)``, int64.
        """
        outer = self.weights, self._counts, self.blank_factor
        if self.blank_factor != 1:
            weights = weights * self.blank_factor
        self.weights, self._counts, self.blank_factor = weights, counts, 1.0
        try:
            yield
        finally:
            self.weights, self._counts, self.blank_factor = outer

    def expect(self, rows: int) -> None:
        """Learn how many rows stand in for the samples, if that is not known yet."""
        counts, self._counts = self._counts, None
        if counts is not None:
            self.weights = self.weights.repeat_interleave(counts, output_size=rows)
