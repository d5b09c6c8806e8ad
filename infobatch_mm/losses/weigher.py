"""What the loss views of one model share: how a loss is weighed by the batch in hand."""

from __future__ import annotations

import torch
from torch import Tensor

from . import logged
from .gradients import ScaledGradient, ShownValue, ValueOfOne, along
from .refusals import HOW_TO
from .step import TrainingStep


class LossWeigher(TrainingStep):
    """Weighs the losses of the batch in hand, and collects its samples' scores.

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

        Returns:
            Tensor: Of ``host_loss``'s shape and dtype.

        Raises:
            ValueError: If the loss is not one of the batch's samples.
        """
        objective = self._objective(per_sample, normaliser, title)
        shown = self._shown_by_contributions(host_loss, objective)
        if mean_over_valid:
            objective = self._without_blanks(objective)
        return _with_objective(shown, objective)

    def weigh_own(self, own: Tensor, host_loss: Tensor, normaliser: Tensor | float, title: str = "a loss") -> Tensor:
        """As :meth:`weigh`, of a loss that does not separate: by the losses of samples alone.

        They need not add up to the host's loss, so its value is brought to the unpruned run's by another rule.

        Args:
            own (Tensor): The host's loss on each sample alone, shape ``(B,)``, with gradient.
            host_loss (Tensor): As :meth:`weigh` takes it.
            normaliser (Tensor | float): Number of samples where the host's loss is a mean over them, 1 where it is a
                sum.
            title (str): The loss's name, for messages.

        Returns:
            Tensor: Of ``host_loss``'s shape and dtype.

        Raises:
            ValueError: If the loss is not one of the batch's samples.
        """
        objective = self._objective(own, normaliser, title)
        return _with_objective(self._shown_by_own(host_loss, own * (len(own) / normaliser)), objective)

    def _objective(self, per_sample: Tensor, normaliser: Tensor | float, title: str) -> Tensor:
        rows = self.batch.rows
        rows.expect(per_sample.numel())
        if per_sample.shape != (rows.number,):
            raise ValueError(
                f"{title} was computed over {per_sample.numel()} samples, but the batch has {rows.number}: "
                f"a loss that drops, splits or multiplies samples cannot be weighed; {HOW_TO}"
            )
        self.distrust(~(per_sample.detach() / normaliser).isfinite())
        return (per_sample * rows.weights_on(per_sample.device)).sum() / normaliser

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
            rows (list[int], optional): How many consecutive entries along ``axis`` belong to each sample. Defaults to
                one each.
            mean_over_valid (bool): See :meth:`weigh`. Defaults to False.

        Returns:
            Tensor: A view of ``predictions``.
        """
        weights = self.weights_on(predictions.device)
        if mean_over_valid:
            weights = self._without_blanks(weights)
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
        factors = along(logged.factors_of_rows(weights), losses, 0) if self.pruned else None
        return ScaledGradient.apply(losses, along(weights, losses, 0), factors)

    def show_by_contributions(self, host_loss: Tensor, contributions: Tensor) -> Tensor:
        """The host's loss with its own gradient, which is weighted where it meets the predictions.

        Args:
            host_loss (Tensor): Of one element, with gradient.
            contributions (Tensor): What the samples contribute to it, shape ``(B,)``, for the value of a pruned pass.
        """
        weighted = (contributions * self.weights_on(contributions.device)).sum()
        return ShownValue.apply(self._shown_by_contributions(host_loss, weighted), host_loss)

    def show_by_own(self, host_loss: Tensor, own: Tensor) -> Tensor:
        """As :meth:`show_by_contributions`, from the host's loss on each sample alone, shape ``(B,)``."""
        return ShownValue.apply(self._shown_by_own(host_loss, own), host_loss) if self.pruned else host_loss

    def _shown_by_contributions(self, host_loss: Tensor, weighted: Tensor) -> Tensor:
        """The value to show, without gradient, from sum(weight_i * c_i): the host's in a full pass."""
        if not self.pruned:
            return host_loss.detach()
        return logged.from_contributions(host_loss, weighted, self._weights_as(weighted))

    def _shown_by_own(self, host_loss: Tensor, own: Tensor) -> Tensor:
        """The value to show, without gradient, from the losses of samples alone: the host's in a full pass."""
        return logged.from_own_losses(host_loss, own, self._weights_as(own)) if self.pruned else host_loss.detach()

    def _weights_as(self, losses: Tensor) -> Tensor:
        """The weights where the losses are, in their precision at least."""
        weights = self.weights_on(losses.device)
        return weights.to(torch.promote_types(weights.dtype, losses.dtype))

    def _without_blanks(self, values: Tensor) -> Tensor:
        """The values times what makes up for the blank samples of a pruned batch, see :meth:`begin`."""
        factor = self.batch.rows.blank_factor
        return values if factor == 1 else values * factor


def _with_objective(shown: Tensor, objective: Tensor) -> Tensor:
    return ValueOfOne.apply(shown, objective.to(shown.dtype).view(shown.shape))
