"""The batch that the loader gave last, and the losses that a script hands over for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.weights import weighted_mean


@dataclass
class Batch:
    """A batch in hand.

    Attributes:
        index (Tensor): Sample indices, shape ``(B,)``, int64, on the accelerator's device.
        weights (Tensor): Shape ``(B,)``, float32, there too.
        pass_index (int): The pass it belongs to.
        lr_factor (float): What the learning rates of its step are multiplied by.
        is_weighed (bool): Whether it was weighed.
        is_settled (bool): Whether it was counted as skipped, when the next one was asked for.
    """

    index: Tensor
    weights: Tensor
    pass_index: int
    lr_factor: float = 1.0
    is_weighed: bool = False
    is_settled: bool = False

    def per_sample(self, values: Tensor, name: str) -> Tensor:
        """One value for each sample, shape ``(B,)``, float32.

        Args:
            values (Tensor): Per sample or per element, shape ``(B, ...)``, any float dtype.
            name (str): What they are, for a message.

        Raises:
            ValueError: If they are of another number of samples.
        """
        count = len(self.index)
        if values.dim() == 0 or len(values) != count:
            raise ValueError(
                f"weigh() needs {name} of {count} samples, shape ({count}, ...), but got shape {tuple(values.shape)}: "
                + _advice(0 if values.dim() == 0 else len(values), count, name)
            )
        return values.float().flatten(1).mean(1) if values.dim() > 1 else values.float()

    def weighted(self, per_sample: Tensor) -> Tensor:
        """What is trained on, ``mean(w * l)``: a scalar, float32."""
        return (self.weights * per_sample).mean()

    def mean(self, per_sample: Tensor) -> Tensor:
        """What the unpruned run would log, as far as this batch tells, ``sum(w * l) / sum(w)``: a scalar, float32.

        Of weights that are all 1 it is the plain mean, to the bit.
        """
        return weighted_mean(self.weights, per_sample)


def ranked_by(losses: Tensor, scores: Tensor) -> Tensor:
    """What samples are ranked by: their scores, and NaN where the loss that is trained on is not finite.

    A sample whose loss is NaN then counts as one without a usable loss, whatever else it is ranked by.

    Args:
        losses (Tensor): Losses that are trained on, shape ``(B,)``, float32.
        scores (Tensor): Of the same shape.

    Returns:
        Tensor: Of the same shape.
    """
    return torch.where(torch.isfinite(losses), scores, float("nan"))


def _advice(given: int, count: int, name: str) -> str:
    if count and given > count and given % count == 0:
        parts = given // count
        halves = "two halves, as prior preservation makes them" if parts == 2 else f"{parts} parts"
        return (
            f"if they are {halves}, weigh the part that belongs to the train dataloader's samples and add the rest as "
            f"it is: infobatch.weigh({name}[:{count}]) + prior_loss_weight * {name}[{count}:].mean()"
        )
    return "use reduction='none', and hand over the losses of the whole batch"
