"""The training step: where a batch is taken in hand and given back, and what views tell of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from .batch_in_hand import BatchInHand


class TrainingStep:
    """Holds the batch from :meth:`begin` to :meth:`end`.

    What is known of a batch is an attribute of :attr:`batch` and goes with it. Here is only what outlives it.

    Attributes:
        mixes (bool): Whether images are mixed in this run, or were: scores keep one scale, also where mixing ends.
        takes_norms (bool): Whether samples are scored by the norms of their gradients, in place of losses.
        norms_of (str): What the scores of the batch that was ended last are norms of, ``'layer'`` or ``'outputs'``;
            ``'losses'`` where no gradient was found.
    """

    def __init__(self) -> None:
        self.mixes = False
        self.takes_norms = False
        self.norms_of = ""
        self._batch: BatchInHand | None = None
        self._suspended = False

    @property
    def active(self) -> bool:
        """Whether a training batch is in hand: else views hand everything to the host."""
        return self._batch is not None and not self._suspended

    @property
    def batch(self) -> BatchInHand:
        """The batch in hand, of which there is one wherever a view weighs."""
        assert self._batch is not None, "no batch is in hand"
        return self._batch

    @property
    def batch_size(self) -> int:
        """Number of samples in the batch in hand, or of rows that stand in for them."""
        return self.batch.rows.number

    @property
    def pruned(self) -> bool:
        """Whether the batch is part of a pruned pass: decides the form of losses that do not separate."""
        return self.batch.pruned

    @property
    def shares(self) -> Tensor | None:
        """Share of each sample (column) in each image (row), shape ``(B, B)``; None where no image was mixed."""
        return self.batch.shares

    @property
    def reached(self) -> bool:
        """Whether the model was asked for the losses of the batch in hand; False without one."""
        return self._batch is not None and self._batch.reached

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let the model compute something else than the batch in hand: views are the host then."""
        before, self._suspended = self._suspended, True
        try:
            yield
        finally:
            self._suspended = before

    def begin(
        self,
        weights: Tensor,
        pruned: bool = True,
        indices: Tensor | None = None,
        pair_weights: Callable[[Tensor, Tensor], Tensor] = torch.mul,
        *,
        blank_factor: float = 1.0,
    ) -> None:
        """Take the next batch in hand. One that was not ended, as after an exception, is dropped with its scores.

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
        self._batch = BatchInHand(weights, pruned, indices, pair_weights, blank_factor, self.takes_norms)

    def end(self) -> tuple[Tensor | None, Tensor | None]:
        """Give the batch back; without one, nothing was scored.

        Returns:
            tuple: Scores, shape ``(B,)``, float32, unweighted, on the loss's device, and which of them
            rest on at least one valid pixel, shape ``(B,)``, bool; both None if no loss was scored. The score is NaN of
            a sample with a loss, be it an auxiliary one, that is NaN or infinite. Where losses were computed of no
            valid pixel at all, no score is valid.

        Raises:
            ValueError: If the batch was trained on with a model in evaluation mode, whose losses were not weighed.
        """
        batch, self._batch = self._batch, None
        if batch is None:
            return None, None
        self.norms_of = batch.norms_of or "losses"
        scored = batch.result()
        if scored is not None:
            return scored
        if batch.evaluated is not None and not batch.reached:
            raise ValueError(
                f"{batch.evaluated} was in evaluation mode in a training step, so InfoBatchHook has left its losses "
                "alone: call its train() before the step (another hook may have left it in eval()), and eval() on "
                "the parts that are to be frozen"
            )
        return None, None

    def mix(self, shares: Tensor) -> None:
        """Learn that the batch was mixed: each of its images is now made of one or two of its samples.

        From here on losses are weighed by the weights of the mixed images. An image's loss, and so its score, is
        divided among its samples by their shares in it.

        Args:
            shares (Tensor): Share of each sample (column) in each image (row), shape ``(B, B)``; an image's
                own sample and at most one other have one.

        Raises:
            ValueError: If the images are not as many as the batch has samples.
        """
        self.batch.mix(shares)

    def pair(self, partner: Tensor) -> None:
        """Learn that each image of the batch is seen by the model together with another.

        From here on losses are weighed by the weights of the pairs; scores stay each image's own.

        Args:
            partner (Tensor): Place in the batch of each image's partner, shape ``(B,)``, int64; its own where it
                has none.
        """
        self.batch.pair(partner)

    def narrowed(self, rows: list[int], data_samples: Sequence[Any] | None = None) -> AbstractContextManager[None]:
        """Let losses be computed over some samples of the batch alone, and be divided by their number.

        Args:
            rows (list[int]): Their places in the batch.
            data_samples (Sequence, optional): What their losses are given as data samples. Defaults to None: nobody
                knows.
        """
        return self.batch.narrowed(rows, data_samples)

    def in_parts(self, counts: Tensor, size: int | None = None) -> AbstractContextManager[None]:
        """Let losses be computed over one list of the parts of all samples, such as tokens.

        Each part has the weight of its sample, whose score is the mean over its parts.

        Args:
            counts (Tensor): How many consecutive parts each sample has, shape ``(B,)``, int64.
            size (int, optional): Their sum. Defaults to None: the number that a loss is called with, because to read
                the sum of the counts would wait for the device.
        """
        return self.batch.in_parts(counts, size)

    def weights_on(self, device: torch.device) -> Tensor:
        """The weights of the batch, or of the rows that stand in for its samples, shape ``(B,)``, moved once."""
        return self.batch.rows.weights_on(device)

    def distrust(self, broken: Tensor) -> None:
        """Learn in which samples a loss that is trained on is NaN or infinite: their scores become NaN.

        Args:
            broken (Tensor): Shape ``(B,)``, bool; or a scalar, where it is not known whose loss it is: then the scores
                of all samples become NaN.
        """
        self.batch.rows.distrust(broken)

    def score(self, mean_loss: Tensor, valid: Tensor | None = None) -> None:
        """Add one loss to the scores of the batch's samples.

        A term without a valid pixel in a sample adds nothing there; a sample is scored if any term has one.

        Args:
            mean_loss (Tensor): Mean of the loss over each sample's valid pixels, shape ``(B,)``.
            valid (Tensor, optional): Whether a sample has a valid pixel, shape ``(B,)``, bool, on any device.
                Defaults to all.
        """
        self.batch.rows.tally.add(mean_loss, valid)
