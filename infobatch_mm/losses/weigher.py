"""What the loss views of one model share: the weights of the batch in hand and the scores it gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.devices import moved
from .gradients import ScaledGradient, ValueOfOne, along

#: Where users find out what to do about a loss that cannot be weighed.
HOW_TO = "write a view for it (see 'Heads and losses of your own' in docs/losses.md), or train without InfoBatchHook"


def cannot_be_weighed(title: str, why: str) -> ValueError:
    """The refusal of a head or loss: its name, what was found and expected, and what to do."""
    return ValueError(f"{title} cannot be weighed: {why}; {HOW_TO}")


def check_reduction(module: nn.Module, title: str) -> None:
    """Refuse a loss module that is configured to give no scalar."""
    if module.reduction not in ("mean", "sum"):
        raise ValueError(f"{title} has reduction={module.reduction!r}, which gives no scalar: use reduction='mean'")


class LossWeigher:
    """Weights of the current batch, and the per-sample losses that its forward pass left behind.

    Between :meth:`begin` and :meth:`end` every loss view weighs what it computes by the batch's weights;
    outside, views hand everything to the host unchanged (validation, for example).
    """

    def __init__(self) -> None:
        self._weights: Tensor | None = None
        self._sample_weights: Tensor | None = None
        self._indices: Tensor | None = None
        self._pair_weights = torch.mul
        self._shares: Tensor | None = None
        self._pruned = True
        self._counts: Tensor | None = None  # rows of each sample, while it is not known how many there are in all
        self._scores: Tensor | None = None
        self._valid: Tensor | None = None
        #: Whether images are mixed in this run, or were: scores keep one scale, also where mixing ends.
        self.mixes = False
        #: The data samples of the batch in the order of its weights, where the model was given some.
        self.data_samples: Sequence[Any] | None = None
        #: Which of them have a label at all, shape ``(B,)``, bool, where that is known.
        self.labelled: Tensor | None = None
        #: Whether the model was asked for the losses of the batch in hand.
        self.reached = False
        self._suspended = False

    @property
    def active(self) -> bool:
        """Whether a training batch is in hand."""
        return self._weights is not None and not self._suspended

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let the model compute something else than the batch in hand: views are the host then."""
        before, self._suspended = self._suspended, True
        try:
            yield
        finally:
            self._suspended = before

    @property
    def batch_size(self) -> int:
        """Number of samples in the batch in hand, or of rows that stand in for them."""
        assert self._weights is not None
        if self._counts is not None:  # only a loss that is evaluated on each row alone asks before it is called
            self.expect(int(self._counts.sum()))
        return self._weights.numel()

    @property
    def shares(self) -> Tensor | None:
        """Share of each sample (column) in each image (row), shape ``(B, B)``; None where no image was mixed."""
        return self._shares

    @property
    def pruned(self) -> bool:
        """Whether the batch is part of a pruned pass: decides the form of losses that do not separate."""
        return self._pruned

    def begin(
        self,
        weights: Tensor,
        pruned: bool = True,
        indices: Tensor | None = None,
        pair_weights: Callable[[Tensor, Tensor], Tensor] = torch.mul,
    ) -> None:
        """Take the weights of the next batch.

        Args:
            weights (Tensor): Shape ``(B,)``, float32; all one in a full pass.
            pruned (bool): Whether the pass leaves samples out. Defaults to True.
            indices (Tensor, optional): Which samples these are, shape ``(B,)``, int64. Defaults to all different.
            pair_weights (Callable): Weights of losses that two samples share, from the weights of both; see
                :meth:`.Plan.pair_weights`. Defaults to their product.
        """
        self._weights = self._sample_weights = weights
        self._indices, self._pair_weights, self._shares = indices, pair_weights, None
        self._pruned = pruned
        self.reached = False
        self.restart()

    def mix(self, shares: Tensor) -> None:
        """Learn that the batch was mixed: each of its images is now made of one or two of its samples.

        From here on the weights are those of the mixed images. An image's loss, and so its score, is divided
        among its samples by their shares in it.

        Args:
            shares (Tensor): Share of each sample (column) in each image (row), shape ``(B, B)``; an image's
                own sample and at most one other have one.

        Raises:
            ValueError: If the images are not as many as the batch has samples.
        """
        assert self._sample_weights is not None
        size = len(self._sample_weights)
        if shares.shape != (size, size):
            raise ValueError(
                f"{len(shares)} images were mixed of {shares.shape[1]} samples in a batch of {size}: the weights of a "
                "batch that is mixed in part, or grows, are not known; mix all of it, or train without InfoBatchHook"
            )
        own = shares.diagonal()
        share, partner = (shares - own.diag()).max(dim=1)
        self.pair(torch.where(share > 0, partner, torch.arange(size, device=shares.device)))
        assert self._weights is not None
        self._weights = torch.where(own > 0, self._weights, self._sample_weights[partner])
        self._shares = shares

    def pair(self, partner: Tensor) -> None:
        """Learn that each image of the batch is seen by the model together with another.

        From here on the weights are those of the pairs; scores stay each image's own.

        Args:
            partner (Tensor): Place in the batch of each image's partner, shape ``(B,)``, int64; its own where it
                has none.
        """
        assert self._sample_weights is not None
        weights = self._sample_weights = moved(self._sample_weights, partner.device)
        # A repeated sample can be paired with itself.
        names = torch.arange(len(weights)) if self._indices is None else self._indices
        names = moved(names, partner.device)
        paired = self._pair_weights(weights, weights[partner])
        self._weights = torch.where(names == names[partner], weights, paired)

    @contextmanager
    def narrowed(self, rows: list[int], data_samples: Sequence[Any] | None = None) -> Iterator[None]:
        """Let losses be computed over some samples of the batch alone.

        Args:
            rows (list[int]): Their places in the batch.
            data_samples (Sequence, optional): What their losses are given for data samples.
        """
        assert self._weights is not None
        places = torch.tensor(rows)
        weights = self._weights[moved(places, self._weights.device)]
        with self._with_rows(weights, None, data_samples, lambda size: places):
            yield

    @contextmanager
    def in_parts(self, counts: Tensor, size: int | None = None) -> Iterator[None]:
        """Let losses be computed over one list of the parts of all samples, such as tokens.

        Each part has the weight of its sample, whose score is the mean over its parts.

        Args:
            counts (Tensor): How many consecutive parts each sample has, shape ``(B,)``, int64.
            size (int, optional): Their sum. Defaults to None: the number that a loss is called with, because to read
                the sum of the counts would wait for the device.
        """
        weights = self.weights_on(counts.device)
        places = torch.arange(len(counts), device=counts.device)
        with self._with_rows(weights, counts, None, lambda size: places.repeat_interleave(counts, output_size=size)):
            if size is not None:
                self.expect(size)
            yield

    @contextmanager
    def _with_rows(
        self,
        weights: Tensor,
        counts: Tensor | None,
        data_samples: Sequence[Any] | None,
        places_of: Callable[[int], Tensor],
    ) -> Iterator[None]:
        """Let other rows stand in for the samples; ``places_of(number)`` gives the place of each row's sample."""
        outer = self._weights, self._counts, self.data_samples, self._scores, self._valid
        self._weights, self._counts, self.data_samples = weights, counts, data_samples
        self._scores = self._valid = None
        try:
            yield
        finally:
            scores, valid = self._scores, self._valid
            self._weights, self._counts, self.data_samples, self._scores, self._valid = outer
        if scores is not None and valid is not None:
            places = moved(places_of(len(scores)), scores.device)
            none = scores.new_zeros(self.batch_size)
            sums, numbers = none.index_add(0, places, scores), none.index_add(0, places, valid.to(none))
            self.score(sums / numbers, numbers > 0)

    def expect(self, size: int) -> None:
        """Learn from a loss how many rows stand in for the samples, if that is not known yet (:meth:`in_parts`)."""
        counts, self._counts = self._counts, None
        if counts is not None:
            assert self._weights is not None
            self._weights = self._weights.repeat_interleave(counts, output_size=size)

    def restart(self) -> None:
        """Forget the scores so far: the batch goes through the model once more."""
        self._scores = self._valid = None
        self.data_samples = self.labelled = None

    def end(self) -> tuple[Tensor | None, Tensor | None]:
        """Close the batch.

        Returns:
            tuple: Scores, shape ``(B,)``, float32, unweighted, on the loss's device, and which of them
            rest on at least one valid pixel, shape ``(B,)``, bool; both None if no loss was scored.
        """
        scores, valid = self._scores, self._valid
        if valid is not None and self.labelled is not None:
            valid = valid & moved(self.labelled, valid.device)
        if scores is not None and valid is not None and self._shares is not None:
            scores, valid = _divided(scores, valid, self._shares)
        self._weights = self._sample_weights = self._shares = None
        self.restart()
        return scores, valid

    def weights_on(self, device: torch.device) -> Tensor:
        """The batch's weights, shape ``(B,)``, moved to a device once."""
        assert self._weights is not None
        if self._weights.device != device:
            self._weights = moved(self._weights, device)
        return self._weights

    def weigh(self, per_sample: Tensor, host_loss: Tensor, normaliser: Tensor | float, title: str = "a loss") -> Tensor:
        """The loss to hand back to the host: its value is the host's, its gradient is weighted.

        The optimised objective is sum(weight_i * c_i) with the contributions c_i = per_sample_i /
        normaliser of the host's own loss; the value shown in the log stays comparable with the unpruned
        run's.

        Args:
            per_sample (Tensor): Sum of the loss over each sample, shape ``(B,)``, with gradient.
            host_loss (Tensor): The host's own reduced loss, of one element; only its value is used.
            normaliser (Tensor | float): What the host divides by, untouched by weights.
            title (str): The loss's name, for messages.

        Returns:
            Tensor: Of ``host_loss``'s shape and dtype.

        Raises:
            ValueError: If the loss is not one of the batch's samples.
        """
        self.expect(per_sample.numel())
        if per_sample.shape != (self.batch_size,):
            raise ValueError(
                f"{title} was computed over {per_sample.numel()} samples, but the batch has {self.batch_size}: "
                f"a loss that drops, splits or multiplies samples cannot be weighed; {HOW_TO}"
            )
        weighted = (per_sample * self.weights_on(per_sample.device)).sum() / normaliser
        return ValueOfOne.apply(host_loss.detach(), weighted.to(host_loss.dtype).view(host_loss.shape))

    @staticmethod
    def mark(loss: Tensor) -> Tensor:
        """The same loss with the same gradient, marked as weighed: for losses whose weights are all 1."""
        return ValueOfOne.apply(loss.detach(), loss)

    def scale_gradient(self, predictions: Tensor, axis: int = 0, rows: list[int] | None = None) -> Tensor:
        """The same predictions; the gradient that comes back through them is multiplied by the weights.

        Where a loss separates over samples, d(sum of weight_i * c_i) / d(prediction_i) is weight_i times
        the host's own gradient: no knowledge of the loss or of its normaliser is needed.

        Args:
            predictions (Tensor): Size B along ``axis``, or any size where ``rows`` says whose each is.
            axis (int): The batch's axis. Defaults to 0.
            rows (list[int], optional): How many consecutive entries along ``axis`` belong to each sample.

        Returns:
            Tensor: A view of ``predictions``.
        """
        return ScaledGradient.apply(predictions, along(self.weights_on(predictions.device), predictions, axis, rows))

    def score(self, mean_loss: Tensor, valid: Tensor | None = None) -> None:
        """Add one loss to the scores of the batch's samples.

        A term without a valid pixel in a sample adds nothing there; a sample is scored if any term has one.

        Args:
            mean_loss (Tensor): Mean of the loss over each sample's valid pixels, shape ``(B,)``.
            valid (Tensor, optional): Whether a sample has a valid pixel, shape ``(B,)``, bool, on any device.
                Defaults to all.
        """
        if valid is None:
            valid = torch.ones_like(mean_loss, dtype=torch.bool)
        valid = moved(valid, mean_loss.device)
        mean_loss = torch.where(valid, mean_loss.detach().float(), 0.0)
        if self._scores is None or self._valid is None:
            self._scores, self._valid = mean_loss, valid
        else:
            self._scores, self._valid = self._scores + mean_loss, self._valid | valid


def _divided(scores: Tensor, valid: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of samples from those of the mixed images they have shares in."""
    shares = torch.where(valid[:, None], shares.to(scores), 0.0)
    total = shares.sum(0)
    # No product with what a sample has no share in: 0 times NaN is NaN.
    parts = torch.where(shares > 0, shares * scores[:, None], 0.0)
    return parts.sum(0) / total, total > 0


def samplewise_sum(elementwise: Tensor) -> Tensor:
    """Sum over all but the first dimension, shape ``(B,)``, at least float32: half precision overflows."""
    dtype = torch.promote_types(elementwise.dtype, torch.float32)
    return elementwise.flatten(1).sum(1, dtype=dtype) if elementwise.dim() > 1 else elementwise.to(dtype)


def valid_per_sample(mask: Tensor) -> Tensor:
    """Number of valid elements of each sample, shape ``(B,)``, int64."""
    return torch.count_nonzero(mask.flatten(1), dim=1) if mask.dim() > 1 else mask.long()
