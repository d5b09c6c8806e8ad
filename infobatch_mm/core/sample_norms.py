"""Norms of the gradients of single samples, from what a backward pass computes anyway.

The gradient that sample i sends into the weights of a linear layer is the sum over its positions p of the outer product
of the gradient at the layer's output and the layer's input, ``G_i = sum_p d_ip a_ip^T``: one contraction, as large as
the layer's own weight gradient. The rest of the backward pass goes on as ever, and nothing waits for a device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: What norms are before the backward pass has come to them.
NOT_YET = -1.0

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_known(layer: nn.Module) -> bool:
    """Whether the gradient of a layer's weights can be taken apart by sample: of linear ones and plain convolutions."""
    if isinstance(layer, _CONVOLUTIONS):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def layer_squares(layer: nn.Module, inputs: Tensor, gradient: Tensor) -> Tensor:
    """Squared norms of the gradients that samples send into a layer's weights and bias.

    Args:
        layer (nn.Module): One that :func:`is_known` tells.
        inputs (Tensor): What the layer was called with, shape ``(B, ...)``, any float dtype.
        gradient (Tensor): The gradient at its output, shape ``(B, ...)``.

    Returns:
        Tensor: Shape ``(B,)``, float32.
    """
    dtype = torch.promote_types(inputs.dtype, gradient.dtype)
    if dtype == torch.float16:  # which sums over many positions overflow
        dtype = torch.float32
    inputs, gradient = inputs.to(dtype), gradient.to(dtype)
    if isinstance(layer, nn.Linear):
        if gradient.dim() == 2:  # one position: the norm of an outer product is the product of the norms
            return _sum_of_squares(gradient) * (_sum_of_squares(inputs) + (layer.bias is not None))
        rows = gradient.flatten(1, -2)
        squares = _sum_of_squares(torch.bmm(rows.transpose(1, 2), inputs.flatten(1, -2)))
        return squares + _sum_of_squares(rows.float().sum(1)) if layer.bias is not None else squares
    assert isinstance(layer, _CONVOLUTIONS)
    flat = gradient.flatten(2)
    parts = [
        _sum_of_squares(torch.bmm(flat, part.flatten(2).transpose(1, 2)))
        for part in _shifted(layer, inputs, gradient.shape[2:])
    ]
    if layer.bias is not None:
        parts.append(_sum_of_squares(flat.float().sum(2)))
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _shifted(layer: Any, inputs: Tensor, size: torch.Size) -> list[Tensor]:
    """What each position of a convolution's kernel sees of the input, in the shape of the output."""
    if any(layer.padding):
        inputs = F.pad(inputs, [each for padding in reversed(layer.padding) for each in (padding, padding)])
    parts = []
    for place in product(*map(range, layer.kernel_size)):
        part = inputs
        for axis, (at, step, dilation) in enumerate(zip(place, layer.stride, layer.dilation, strict=True)):
            start = at * dilation
            part = part[(slice(None),) * (2 + axis) + (slice(start, start + (size[axis] - 1) * step + 1, step),)]
        parts.append(part)
    return parts


def _sum_of_squares(values: Tensor) -> Tensor:
    """Over all but the first dimension, shape ``(B,)``, float32: squares of half precision overflow."""
    if values.dtype == torch.float64:  # which vector_norm() does not narrow
        values = values.float()
    return torch.linalg.vector_norm(values.reshape(len(values), -1), dim=1, dtype=torch.float32).square()


class SampleNorms:
    """Norms of the gradients of one batch's samples, which its backward pass fills in.

    Watch a layer or the outputs in the forward pass, then say by :meth:`expect` what the backward pass begins from.

    Attributes:
        is_known (bool): Whether the backward pass has come to all that is watched.
    """

    def __init__(self) -> None:
        self.is_known = False
        self._watched = self._come = 0
        self._squares: Tensor | None = None
        self._norms: Tensor | None = None
        self._factors: Tensor | None = None
        self._upstream: Tensor | None = None

    def watch_layer(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> None:
        """Take the norms from a call of a layer; its output has a gradient."""
        self._watched += 1
        output.register_hook(partial(self._from_layer, layer, inputs.detach()))

    def watch_outputs(self, outputs: Tensor) -> None:
        """Take the norms at the model's outputs, shape ``(B, ...)``, which have a gradient."""
        self._watched += 1
        outputs.register_hook(self._from_outputs)

    def expect(self, losses: Tensor, factors: Tensor, objective: Tensor) -> Tensor:
        """Give back the norms that the backward pass from an objective will fill in.

        Args:
            losses (Tensor): Losses of the samples, shape ``(B,)``.
            factors (Tensor): What each loss was multiplied by in the objective, shape ``(B,)``, float32, on the same
                device. A norm is the gradient's over its factor.
            objective (Tensor): Scalar with a gradient. What its own gradient is, such as the scale of a mixed-precision
                loss or the share of an accumulated one, is divided out too.

        Returns:
            Tensor: Shape ``(B,)``, float32: :data:`NOT_YET`, and NaN where a loss is not finite.
        """
        self._norms = losses.detach().float() * 0.0 + NOT_YET  # NaN where a loss is not finite
        self._factors = factors
        if objective.requires_grad:
            objective.register_hook(self._from_objective)
        return self._norms

    def in_place_of(self, losses: Tensor) -> Tensor:
        """The norms after the backward pass, or :data:`NOT_YET`, shape ``(B,)``; NaN where a loss is."""
        if self._norms is None:
            return torch.full_like(losses, NOT_YET)
        return torch.where(losses.isnan(), losses, self._norms.to(losses.device))

    def _from_objective(self, gradient: Tensor) -> None:
        # A second backward pass from here fills in the same norms; one from elsewhere is none of this batch's.
        self._squares, self._come = None, 0
        gradient = gradient.detach()
        self._upstream = (gradient.sum() if gradient.dim() else gradient).abs().float()

    def _from_layer(self, layer: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        with torch.no_grad(), _without_autocast(gradient.device.type):
            if (gradient := self._of_losses(gradient)) is not None:
                self._fill(layer_squares(layer, inputs, gradient))

    def _from_outputs(self, gradient: Tensor) -> None:
        with torch.no_grad():
            if (gradient := self._of_losses(gradient)) is not None:
                self._fill(_sum_of_squares(gradient))

    def _of_losses(self, gradient: Tensor) -> Tensor | None:
        """A gradient without what the objective was scaled by; None where it is not of the expected backward pass."""
        if self._norms is None or self._upstream is None or len(gradient) != len(self._norms):
            return None
        # Divided before it is squared: scales of losses grow beyond the root of the largest number. Half precision
        # first gets the range that small gradients need without their scale.
        if gradient.dtype == torch.float16:
            gradient = gradient.float()
        return gradient / self._upstream

    def _fill(self, squares: Tensor) -> None:
        if self._come >= self._watched:
            return
        assert self._norms is not None
        self._come += 1
        self.is_known = self._come == self._watched
        # What was watched in several places is one gradient.
        self._squares = squares if self._squares is None else self._squares + squares
        norms = self._squares.sqrt() / self._factors
        # In place: whoever records the norms holds this very tensor. A gradient that overflowed is none. A difference
        # with itself is 0 where both are finite, in half as many operations as isfinite() takes.
        both = norms + self._norms
        self._norms.copy_(torch.where(both - both == 0, norms, self._norms))


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """A context in which nothing is cast to half precision."""
    try:
        is_on = torch.is_autocast_enabled(device)
    except TypeError:  # before torch 2.4 it tells of one kind of device only
        is_on = True
    # To enter the context takes longer than the product inside it.
    return torch.autocast(device, enabled=False) if is_on else nullcontext()
