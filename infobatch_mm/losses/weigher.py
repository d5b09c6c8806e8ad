"""What the loss views of one model share: the weights of the batch in hand and the scores it gave."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LossWeigher:
    """Weights of the current batch, and the per-sample losses that its forward pass left behind.

    Between :meth:`begin` and :meth:`end` every loss view weighs what it computes by the batch's weights;
    outside, views hand everything to the host unchanged (validation, for example).
    """

    def __init__(self) -> None:
        self._weights: Tensor | None = None
        self._scores: dict[object, tuple[Tensor, Tensor]] = {}

    @property
    def active(self) -> bool:
        """Whether a training batch is in hand."""
        return self._weights is not None

    def begin(self, weights: Tensor) -> None:
        """Take the weights of the next batch, shape ``(B,)``, float32."""
        self._weights, self._scores = weights, {}

    def end(self) -> tuple[Tensor | None, Tensor | None]:
        """Close the batch.

        Returns:
            tuple: Scores, shape ``(B,)``, float32, unweighted, on the loss's device, and which of them
            rest on at least one valid pixel, shape ``(B,)``, bool; both None if no loss was scored.
        """
        parts = list(self._scores.values())
        self._weights, self._scores = None, {}
        if not parts:
            return None, None
        scores, valid = parts[0]
        for more, also_valid in parts[1:]:
            scores, valid = scores + more, valid & also_valid
        return scores, valid

    def weigh(self, per_sample: Tensor, host_loss: Tensor, normaliser: Tensor | float) -> Tensor:
        """The loss to hand back to the host: its value is the host's, its gradient is weighted.

        The optimised objective is sum(weight_i * c_i) with the contributions c_i = per_sample_i /
        normaliser of the host's own loss; the value shown in the log stays comparable with the unpruned
        run's.

        Args:
            per_sample (Tensor): Sum of the loss over each sample, shape ``(B,)``, with gradient.
            host_loss (Tensor): The host's own reduced loss, scalar; only its value is used.
            normaliser (Tensor | float): What the host divides by, untouched by weights.

        Returns:
            Tensor: Scalar of ``host_loss``'s dtype.
        """
        assert self._weights is not None
        if self._weights.shape != per_sample.shape:
            raise ValueError(
                f"a loss was computed over {per_sample.numel()} samples, but the batch has {self._weights.numel()}: "
                "a loss that drops, splits or multiplies samples cannot be weighed"
            )
        if self._weights.device != per_sample.device:
            self._weights = self._weights.to(per_sample.device, non_blocking=True)
        weighted = (per_sample * self._weights).sum() / normaliser
        return _ValueOfOne.apply(host_loss.detach(), weighted.to(host_loss.dtype))

    def score(self, view: object, mean_loss: Tensor, valid: Tensor) -> None:
        """Set one view's share of the scores of the batch's samples; a second forward pass replaces it.

        Args:
            view (object): The view that computed the loss.
            mean_loss (Tensor): Mean of the loss over each sample's valid pixels, shape ``(B,)``.
            valid (Tensor): Whether a sample has a valid pixel, shape ``(B,)``, bool.
        """
        self._scores[view] = (mean_loss.detach().float(), valid)


class _ValueOfOne(torch.autograd.Function):
    """Forward the value of the first argument, backward the gradient to the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, objective: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


def samplewise_sum(elementwise: Tensor) -> Tensor:
    """Sum over all but the first dimension, shape ``(B,)``, at least float32: half precision overflows."""
    dtype = torch.promote_types(elementwise.dtype, torch.float32)
    return elementwise.flatten(1).sum(1, dtype=dtype) if elementwise.dim() > 1 else elementwise.to(dtype)


def valid_per_sample(mask: Tensor) -> Tensor:
    """Number of valid elements of each sample, shape ``(B,)``, int64."""
    return torch.count_nonzero(mask.flatten(1), dim=1) if mask.dim() > 1 else mask.long()
