"""What the views do to gradients, without waiting for the device that they are on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.devices import moved


def along(values: Tensor, tensor: Tensor, axis: int, rows: list[int] | None = None) -> Tensor:
    """One value for each sample, in the shape that meets the entries of a tensor.

    Args:
        values (Tensor): Shape ``(B,)``, any dtype, on the tensor's device.
        tensor (Tensor): Size B along ``axis``, or any size where ``rows`` says whose each entry is.
        axis (int): The batch's axis.
        rows (list[int], optional): How many consecutive entries along ``axis`` belong to each sample.

    Returns:
        Tensor: As many dimensions as the tensor has, of size 1 but along ``axis``.
    """
    if rows is not None:
        values = values.repeat_interleave(
            moved(torch.tensor(rows, dtype=torch.int64, device="cpu"), values.device), output_size=tensor.shape[axis]
        )
    return values.view([-1 if dim == axis else 1 for dim in range(tensor.dim())])


class ValueOfOne(torch.autograd.Function):
    """Forward the value of the first argument, backward the gradient to the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, objective: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


class ShownValue(ValueOfOne):
    """The same for a loss that is weighed further back.

    It has a node of its own in the graph: :class:`.Coverage` takes a :class:`ValueOfOne` for a weighed objective, and
    would not see that such a loss has a term which is not weighed anywhere.
    """


class ScaledGradient(torch.autograd.Function):
    """Forward the first argument, times the third if there is one; backward its gradient times the second."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor, factors: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(weights)
        return values.view_as(values) if factors is None else (values * factors).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weights,) = ctx.saved_tensors
        return (grads[0] * weights).to(grads[0].dtype), None, None
