"""The batch in hand: all that is known of one training batch, from the beginning of its step to the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.devices import moved
from ..core.sample_norms import SampleNorms
from .rows import Rows
from .tally import divided


class BatchInHand:
    """One batch: its weights, and what the forward passes of the model leave behind.

    Args:
        weights (Tensor): Of the samples, shape ``(B,)``, float32.
        pruned (bool): Whether the pass leaves samples out.
        indices (Tensor, optional): Which samples these are, shape ``(B,)``, int64; None where nobody named them.
        pair_weights (Callable): Weights of losses that two samples share, from the weights of both.
        blank_factor (float): See :meth:`.TrainingStep.begin`.
        takes_norms (bool): Whether samples are scored by the norms of their gradients. Defaults to False.

    Attributes:
        size (int): Number B of samples.
        pruned (bool): As given. Decides the form of losses that do not separate.
        planned (bool): Whether the batch comes from a plan, which may leave samples out: its samples are named.
        rows (Rows): What losses are computed over now.
        shares (Tensor, optional): Share of each sample (column) in each image (row), shape ``(B, B)``; None where no
            image was mixed.
        labelled (Tensor, optional): Which samples have a label at all, shape ``(B,)``, bool; None where nobody knows.
        met (bool): Whether a loss that counts in the scores was computed, be it of no valid pixel at all.
        reached (bool): Whether the model was asked for the losses of the batch.
        evaluated (str, optional): Name of a model that was asked for losses to train on in evaluation mode.
        norms (SampleNorms, optional): Norms of the samples' gradients, which the backward pass fills in.
        norms_of (str): What they are of, ``'layer'`` or ``'outputs'``; empty while nothing is watched.
    """

    def __init__(
        self,
        weights: Tensor,
        pruned: bool,
        indices: Tensor | None,
        pair_weights: Callable[[Tensor, Tensor], Tensor],
        blank_factor: float,
        takes_norms: bool = False,
    ) -> None:
        self.size = len(weights)
        self.pruned = pruned
        self.planned = pruned or indices is not None
        self.rows = Rows(weights, blank_factor=blank_factor if pruned else 1.0)
        self.shares: Tensor | None = None
        self.labelled: Tensor | None = None
        self.met = self.reached = False
        self.evaluated: str | None = None
        self._takes_norms = takes_norms
        self._begin_norms()
        self._sample_weights, self._indices, self._pair_weights = weights, indices, pair_weights

    def restart(self) -> None:
        """Forget the scores so far: the batch goes through the model once more.

        The weights stay: images are mixed before the model is called, and would be weighed as unmixed ones.
        """
        self.rows = Rows(self.rows.weights, blank_factor=self.rows.blank_factor)
        self.labelled = None
        self.met = False
        self._begin_norms()

    def _begin_norms(self) -> None:
        self.norms = SampleNorms() if self._takes_norms else None
        self.norms_of = ""

    def mix(self, shares: Tensor) -> None:
        """Weigh mixed images from here on; see :meth:`.TrainingStep.mix`."""
        size = self.size
        if shares.shape != (size, size):
            raise ValueError(
                f"{len(shares)} images were mixed of {shares.shape[1]} samples in a batch of {size}: the weights of a "
                "batch that is mixed in part, or grows, are not known; mix all of it, or train without InfoBatchHook"
            )
        own = shares.diagonal()
        share, partner = (shares - own.diag()).max(dim=1)
        weights = self._paired(torch.where(share > 0, partner, torch.arange(size, device=shares.device)))
        # An image that holds nothing of its own sample is the other sample, unmixed.
        self.rows.weights = torch.where(own > 0, weights, self._sample_weights[partner])
        self.shares = shares

    def pair(self, partner: Tensor) -> None:
        """Weigh pairs from here on; see :meth:`.TrainingStep.pair`."""
        self.rows.weights = self._paired(partner)

    def _paired(self, partner: Tensor) -> Tensor:
        """The weights of the pairs that the samples make with their partners, whatever was weighed before."""
        weights = self._sample_weights = moved(self._sample_weights, partner.device)
        # A repeated sample can be paired with itself.
        names = torch.arange(self.size, device="cpu") if self._indices is None else self._indices
        names = moved(names, partner.device)
        paired = self._pair_weights(weights, weights[partner])
        return torch.where(names == names[partner], weights, paired)

    @contextmanager
    def narrowed(self, places: list[int], data_samples: Sequence[Any] | None) -> Iterator[None]:
        """Let some samples stand for the batch; see :meth:`.TrainingStep.narrowed`."""
        kept = torch.tensor(places, dtype=torch.int64, device="cpu")
        weights = self.rows.weights_within
        rows = Rows(weights[moved(kept, weights.device)], data_samples=data_samples)
        with self._standing_in(rows, lambda number: kept):
            yield

    @contextmanager
    def in_parts(self, counts: Tensor, size: int | None) -> Iterator[None]:
        """Let the parts of the samples stand for the batch; see :meth:`.TrainingStep.in_parts`."""
        self.rows.weights_on(counts.device)
        rows = Rows(self.rows.weights_within, counts)
        if size is not None:
            rows.expect(size)
        places = torch.arange(len(counts), device=counts.device)
        with self._standing_in(rows, lambda number: places.repeat_interleave(counts, output_size=number)):
            yield

    @contextmanager
    def _standing_in(self, rows: Rows, places_of: Callable[[int], Tensor]) -> Iterator[None]:
        """Let other rows stand in for the present ones; ``places_of(number)`` gives the place of each one's sample."""
        outer, self.rows = self.rows, rows
        try:
            yield
        finally:
            # Else losses after one that raised would be weighed by the wrong rows, if somebody goes on.
            self.rows = outer
        outer.tally.take_rows(rows.tally, places_of, outer.number)

    def result(self) -> tuple[Tensor, Tensor] | None:
        """Scores of the samples and which of them are valid; None if no loss was scored."""
        scored = self.rows.tally.result()
        if scored is None:
            if not self.met:
                return None
            nothing = torch.zeros(self.size, dtype=torch.float32, device=self.rows.weights.device)
            scored = nothing, nothing.bool()
        scores, valid = scored
        if self.labelled is not None:
            valid = valid & moved(self.labelled, valid.device)
        if self.norms is not None:
            scores = self.norms.in_place_of(scores) if self.norms_of else scores.clamp(min=0)
        return (scores, valid) if self.shares is None else divided(scores, valid, self.shares)
