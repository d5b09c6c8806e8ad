"""The weights of one plan, by sample index, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .devices import moved
from .plan import Plan


class PlanWeights:
    """Looks weights up without waiting for a device.

    Args:
        plan (Plan): Whose weights.
        num_samples (int): Size N of the data set.
    """

    def __init__(self, plan: Plan, num_samples: int) -> None:
        self._plan = plan
        self._num_samples = num_samples
        self._by_sample: dict[torch.device, Tensor] = {}

    def __call__(self, indices: Tensor) -> Tensor:
        """Weights of some samples.

        Args:
            indices (Tensor): Sample indices, shape ``(B,)``, int64, on any device. What is outside of [0, N) is
                brought into it, because a device answers an index out of range by ending the process; who hands
                indices on looks at them as soon as they are on the CPU.

        Returns:
            Tensor: Shape ``(B,)``, float32, on the same device; 0 for samples that the plan leaves out.
        """
        weights = self._on(indices.device)
        return weights[indices.clamp(0, self._num_samples - 1)]

    def _on(self, device: torch.device) -> Tensor:
        if device not in self._by_sample:
            weights = torch.zeros(self._num_samples, dtype=torch.float32, device="cpu")
            weights[self._plan.indices] = self._plan.weights
            # A blocking copy would make the step wait for all work that the device has queued.
            self._by_sample[device] = moved(weights, device)
        return self._by_sample[device]


def weighted_mean(weights: Tensor | None, losses: Tensor) -> Tensor:
    """``sum(w * l) / sum(w)``, the mean loss of a batch as the unpruned run would see it.

    Args:
        weights (Tensor, optional): Shape ``(B,)``, float32; where one is 0, its loss is not looked at. None for ones.
        losses (Tensor): Shape ``(B,)``, float32, on the same device.

    Returns:
        Tensor: Scalar, float32, without a gradient. For a log, never for an objective: dividing by the sum of the
        weights is biased.
    """
    if weights is None:
        return losses.detach().mean()
    losses = torch.where(weights == 0, 0.0, losses.detach())
    # The quotient is exactly 1 where all weights are: the plain mean, to the bit.
    return (weights * losses).mean() * (len(losses) / weights.sum())
