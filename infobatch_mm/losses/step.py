"""The training step in hand: the weights of its batch, and the scores that its losses leave behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.devices import moved
from .batch_in_hand import BatchInHand
from .tally import Tally, divided


class TrainingStep:
    """Weights of the current batch, and the per-sample losses that its forward pass left behind."""

    def __init__(self) -> None:
        self._batch: BatchInHand | None = None
        self._pruned = True
        self._tally = Tally()
        self._suspended = False
        #: Whether images are mixed in this run, or were: scores keep one scale, also where mixing ends.
        self.mixes = False
        #: The data samples of the batch in the order of its weights, where the model was given some.
        self.data_samples: Sequence[Any] | None = None
        #: Which of them have a label at all, shape ``(B,)``, bool, where that is known.
        self.labelled: Tensor | None = None
        #: Whether the model was asked for the losses of the batch in hand.
        self.reached = False
        #: Whether a loss that counts in the scores was computed, be it of no valid pixel at all.
        self.met = False
        #: Whether batches come from plans, which may leave samples out: their samples are named.
        self.planned = False
        #: Name of a model that was asked for losses to train on in evaluation mode.
        self.evaluated: str | None = None

    @property
    def active(self) -> bool:
        """Whether a training batch is in hand."""
        return self._batch is not None and not self._suspended

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let the model compute something else than the batch in hand: views are the host then."""
        before, self._suspended = self._suspended, True
        try:
            yield
        finally:
            self._suspended = before

    @property
    def _in_hand(self) -> BatchInHand:
        assert self._batch is not None
        return self._batch

    @property
    def _weights(self) -> Tensor | None:
        return None if self._batch is None else self._batch.weights

    @property
    def batch_size(self) -> int:
        """Number of samples in the batch in hand, or of rows that stand in for them."""
        return self._in_hand.num_rows

    @property
    def shares(self) -> Tensor | None:
        """Share of each sample (column) in each image (row), shape ``(B, B)``; None where no image was mixed."""
        return None if self._batch is None else self._batch.shares

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
        *,
        blank_factor: float = 1.0,
    ) -> None:
        """Take the weights of the next batch.

        Args:
            weights (Tensor): Shape ``(B,)``, float32; all one in a full pass.
            pruned (bool): Whether the pass leaves samples out. Defaults to True.
            indices (Tensor, optional): Which samples of a plan these are, shape ``(B,)``, int64. Defaults to all
                different, in a run that is watched only, unless the pass is pruned: a loss that could not be weighed
                then is not refused.
            pair_weights (Callable): Weights of losses that two samples share, from the weights of both; see
                :meth:`.Plan.pair_weights`. Defaults to their product.
            blank_factor (float): What the gradients of losses are multiplied by, in a pruned pass, that are divided by
                the number of valid elements of their batch; neither values nor scores are. Samples without a valid
                element are never pruned, so the batches of a pruned pass hold more of them; see
                :func:`.core.blanks.blank_factor`. Defaults to 1.

        Raises:
            ValueError: If the factor is not a positive number.
        """
        if not 0 < blank_factor < float("inf"):
            raise ValueError(f"blank_factor={blank_factor}: expected a positive number, 1 where no sample is blank")
        self._batch = BatchInHand(weights, indices, pair_weights, blank_factor if pruned else 1.0)
        self._pruned = pruned
        self.planned = pruned or indices is not None
        self.reached = False
        self.evaluated = None
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
        self._in_hand.mix(shares)

    def pair(self, partner: Tensor) -> None:
        """Learn that each image of the batch is seen by the model together with another.

        From here on the weights are those of the pairs; scores stay each image's own.

        Args:
            partner (Tensor): Place in the batch of each image's partner, shape ``(B,)``, int64; its own where it
                has none.
        """
        self._in_hand.pair(partner)

    @contextmanager
    def narrowed(self, rows: list[int], data_samples: Sequence[Any] | None = None) -> Iterator[None]:
        """Let losses be computed over some samples of the batch alone, and be divided by their number.

        Args:
            rows (list[int]): Their places in the batch.
            data_samples (Sequence, optional): What their losses are given for data samples.
        """
        places = torch.tensor(rows, dtype=torch.int64, device="cpu")
        weights = self._weights
        assert weights is not None
        with self._with_rows(weights[moved(places, weights.device)], None, data_samples, lambda size: places):
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
        outer = self.data_samples, self._tally
        self.data_samples, self._tally = data_samples, Tally()
        rows = self._tally
        try:
            with self._in_hand.with_rows(weights, counts):
                yield
        finally:
            self.data_samples, self._tally = outer
        known = rows.broken if rows.scores is None else rows.scores
        if known is not None:
            self._tally.take_rows(rows, places_of(len(known)), self.batch_size)

    def expect(self, size: int) -> None:
        """Learn from a loss how many rows stand in for the samples, if that is not known yet (:meth:`in_parts`)."""
        self._in_hand.expect(size)

    def restart(self) -> None:
        """Forget the scores so far: the batch goes through the model once more."""
        self._tally = Tally()
        self.data_samples = self.labelled = None
        self.met = False

    def end(self) -> tuple[Tensor | None, Tensor | None]:
        """Close the batch.

        Returns:
            tuple: Scores, shape ``(B,)``, float32, unweighted, on the loss's device, and which of them
            rest on at least one valid pixel, shape ``(B,)``, bool; both None if no loss was scored. The score is NaN of
            a sample with a loss, be it an auxiliary one, that is NaN or infinite. Where losses were computed of no
            valid pixel at all, no score is valid.

        Raises:
            ValueError: If the batch was trained on with a model in evaluation mode, whose losses were not weighed.
        """
        batch, self._batch = self._batch, None
        result, labelled, met = self._tally.result(), self.labelled, self.met
        self.restart()
        if result is None and batch is not None and met:
            nothing = torch.zeros(batch.size, dtype=torch.float32, device=batch.weights.device)
            result = nothing, nothing.bool()
        if result is None:
            if self.evaluated is not None and not self.reached:
                raise ValueError(
                    f"{self.evaluated} was in evaluation mode in a training step, so InfoBatchHook has left its losses "
                    "alone: call its train() before the step (another hook may have left it in eval()), and eval() on "
                    "the parts that are to be frozen"
                )
            return None, None
        scores, valid = result
        if labelled is not None:
            valid = valid & moved(labelled, valid.device)
        shares = None if batch is None else batch.shares
        return (scores, valid) if shares is None else divided(scores, valid, shares)

    def weights_on(self, device: torch.device) -> Tensor:
        """The batch's weights, shape ``(B,)``, moved to a device once."""
        return self._in_hand.weights_on(device)

    def distrust(self, broken: Tensor) -> None:
        """Learn in which samples a loss that is trained on is NaN or infinite: their scores become NaN.

        Args:
            broken (Tensor): Shape ``(B,)``, bool; or a scalar of a loss whose samples are not known, for all of them.
        """
        self._tally.distrust(broken if broken.dim() else broken.expand(self.batch_size))

    def score(self, mean_loss: Tensor, valid: Tensor | None = None) -> None:
        """Add one loss to the scores of the batch's samples.

        A term without a valid pixel in a sample adds nothing there; a sample is scored if any term has one.

        Args:
            mean_loss (Tensor): Mean of the loss over each sample's valid pixels, shape ``(B,)``.
            valid (Tensor, optional): Whether a sample has a valid pixel, shape ``(B,)``, bool, on any device.
                Defaults to all.
        """
        self._tally.add(mean_loss, valid)
