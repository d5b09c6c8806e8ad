"""What the loss views of one model share: how losses are weighed by the batch in hand, and what they leave behind."""

from __future__ import annotations

import torch
from torch import Tensor

from . import logged
from .gradients import ScaledGradient, ShownValue, ValueOfOne, along
from .refusals import HOW_TO
from .step import TrainingStep


class LossWeigher(TrainingStep):
    """Weights of the current batch, and the per-sample losses that its forward pass left behind.

    Between :meth:`begin` and :meth:`end` every loss view weighs what it computes by the batch's weights;
    outside, views hand everything to the host unchanged (validation, for example).
    """

    def weigh(
        self,
        per_sample: Tensor,
        host_loss: Tensor,
        normaliser: Tensor | float,
        title: str = "a loss",
        *,
        mean_over_valid: bool = False,
        own: bool = False,
    ) -> Tensor:
        """The loss to hand back to the host: its value is comparable with the host's, its gradient is weighted.

        The optimised objective is sum(weight_i * c_i) with the contributions c_i = per_sample_i / normaliser of the
        host's own loss. The value is the host's in a full pass, and in a pruned one comparable with the unpruned run's:
        see :mod:`.logged`.

        Args:
            per_sample (Tensor): Sum of the loss over each sample, shape ``(B,)``, with gradient.
            host_loss (Tensor): The host's own reduced loss, of one element; only its value is used.
            normaliser (Tensor | float): What the host divides by, untouched by weights.
            title (str): The loss's name, for messages.
            mean_over_valid (bool): Whether the normaliser counts the valid elements of the batch, or adds up what
                depends on them; see :meth:`begin`. Defaults to False.
            own (bool): Whether these are the losses of samples alone, which need not add up to the host's. Defaults to
                False.

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
        self.distrust(~(per_sample.detach() / normaliser).isfinite())
        shown = self.shown(host_loss, per_sample * (len(per_sample) / normaliser) if own else weighted, own=own)
        if mean_over_valid and self._in_hand.blank_factor != 1:
            weighted = weighted * self._in_hand.blank_factor
        return ValueOfOne.apply(shown, weighted.to(host_loss.dtype).view(host_loss.shape))

    def shown(self, host_loss: Tensor, losses: Tensor, *, own: bool) -> Tensor:
        """The value to show for a loss, without gradient: the host's in a full pass; see :mod:`.logged`.

        Args:
            host_loss (Tensor): The host's own reduced loss, of one element.
            losses (Tensor): The losses of samples alone, shape ``(B,)``, or the weighted sum of contributions.
            own (bool): Which of them these are.
        """
        if not self._pruned:
            return host_loss.detach()
        weights = self.weights_on(losses.device)
        weights = weights.to(torch.promote_types(weights.dtype, losses.dtype))
        return (logged.from_own_losses if own else logged.from_contributions)(host_loss, losses, weights)

    @staticmethod
    def mark(loss: Tensor) -> Tensor:
        """The same loss with the same gradient, marked as weighed: for losses whose weights are all 1."""
        return ValueOfOne.apply(loss.detach(), loss)

    def scale_gradient(
        self, predictions: Tensor, axis: int = 0, rows: list[int] | None = None, *, mean_over_valid: bool = False
    ) -> Tensor:
        """The same predictions; the gradient that comes back through them is multiplied by the weights.

        Where a loss separates over samples, d(sum of weight_i * c_i) / d(prediction_i) is weight_i times
        the host's own gradient: no knowledge of the loss or of its normaliser is needed.

        Args:
            predictions (Tensor): Size B along ``axis``, or any size where ``rows`` says whose each is.
            axis (int): The batch's axis. Defaults to 0.
            rows (list[int], optional): How many consecutive entries along ``axis`` belong to each sample.
            mean_over_valid (bool): See :meth:`weigh`. Defaults to False.

        Returns:
            Tensor: A view of ``predictions``.
        """
        weights = self.weights_on(predictions.device)
        if mean_over_valid and self._in_hand.blank_factor != 1:
            weights = weights * self._in_hand.blank_factor
        return ScaledGradient.apply(predictions, along(weights, predictions, axis, rows), None)

    def weigh_rows(self, losses: Tensor) -> Tensor:
        """Losses of the samples that the host is yet to add up or to average, weighted.

        Args:
            losses (Tensor): A value, or elements, of each sample: shape ``(B, ...)``, with gradient.

        Returns:
            Tensor: Their gradient is multiplied by the weights. Their values are the host's in a full pass; in a
            pruned one, their sum and their mean are comparable with the unpruned run's.
        """
        weights = self.weights_on(losses.device)
        self.distrust(~losses.detach().flatten(1).isfinite().all(1) if losses.dim() > 1 else ~losses.isfinite())
        factors = along(logged.factors_of_rows(weights), losses, 0) if self._pruned else None
        return ScaledGradient.apply(losses, along(weights, losses, 0), factors)

    def of_host(self, host_loss: Tensor, losses: Tensor, *, own: bool) -> Tensor:
        """The host's loss with its own gradient, which is weighted where it meets the predictions.

        Args:
            host_loss (Tensor): Of one element, with gradient.
            losses (Tensor): For the value that is shown in a pruned pass: the losses of samples alone, or what they
                contribute to the host's, shape ``(B,)``.
            own (bool): Which of them these are.
        """
        if not self._pruned:
            return host_loss
        if not own:
            losses = (losses * self.weights_on(losses.device)).sum()
        return ShownValue.apply(self.shown(host_loss, losses, own=own), host_loss)


def samplewise_sum(elementwise: Tensor) -> Tensor:
    """Sum over all but the first dimension, shape ``(B,)``, at least float32: half precision overflows."""
    dtype = torch.promote_types(elementwise.dtype, torch.float32)
    return elementwise.flatten(1).sum(1, dtype=dtype) if elementwise.dim() > 1 else elementwise.to(dtype)


def valid_per_sample(mask: Tensor) -> Tensor:
    """Number of valid elements of each sample, shape ``(B,)``, int64."""
    return torch.count_nonzero(mask.flatten(1), dim=1) if mask.dim() > 1 else mask.long()
