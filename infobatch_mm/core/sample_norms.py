"""Norms of the gradients of single samples, from what a backward pass computes anyway.

The gradient that sample i sends into the weights of a linear layer is the sum over its positions p of the outer product
of the gradient at the layer's output and the layer's input, ``G_i = sum_p d_ip a_ip^T``: one contraction, as large as
the layer's own weight gradient. The rest of the backward pass goes on as ever, and nothing waits for a device.
"""

from __future__ import annotations

from functools import partial
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
    squares = flat.new_zeros(len(flat), dtype=torch.float32)
    for part in _shifted(layer, inputs, gradient.shape[2:]):
        squares = squares + _sum_of_squares(torch.bmm(flat, part.flatten(2).transpose(1, 2)))
    return squares + _sum_of_squares(flat.float().sum(2)) if layer.bias is not None else squares


def _shifted(layer: Any, inputs: Tensor, size: torch.Size) -> list[Tensor]:
    """What each position of a convolution's kernel sees of the input, in the shape of the output."""
    if any(layer.padding):
        inputs = F.pad(inputs, [each for padding in reversed(layer.padding) for each in (padding, padding)])
    parts = []
    for place in torch.cartesian_prod(*(torch.arange(k, device="cpu") for k in layer.kernel_size)).view(
        -1, len(layer.kernel_size)
    ):
        part = inputs
        for axis, (at, step, dilation) in enumerate(zip(place.tolist(), layer.stride, layer.dilation, strict=True)):
            start = at * dilation
            part = part[(slice(None),) * (2 + axis) + (slice(start, start + (size[axis] - 1) * step + 1, step),)]
        parts.append(part)
    return parts


def _sum_of_squares(values: Tensor) -> Tensor:
    """Over all but the first dimension, shape ``(B,)``, float32: squares of half precision overflow."""
    return values.reshape(len(values), -1).float().square().sum(1)


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
        finite = torch.isfinite(losses.detach())
        self._norms = torch.where(finite, NOT_YET, float("nan")).to(torch.float32)
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
        self._upstream = gradient.detach().sum().abs().float()

    def _from_layer(self, layer: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            unit = _unit(gradient)
            self._fill(layer_squares(layer, inputs, gradient / unit), unit)

    def _from_outputs(self, gradient: Tensor) -> None:
        with torch.no_grad():
            unit = _unit(gradient)
            self._fill(_sum_of_squares(gradient / unit), unit)

    def _fill(self, squares: Tensor, unit: Tensor) -> None:
        if self._norms is None or self._factors is None or self._upstream is None or len(squares) != len(self._norms):
            return
        if self._come >= self._watched:
            return
        self._come += 1
        self.is_known = self._come == self._watched
        # Divided before it is squared: scales of losses grow beyond the root of the largest number. What was watched
        # in several places is one gradient.
        squares = squares * (unit.float() / self._upstream).square()
        self._squares = squares if self._squares is None else self._squares + squares
        norms = self._squares.sqrt() / self._factors
        # In place: whoever records the norms holds this very tensor. A gradient that overflowed is none.
        self._norms.copy_(torch.where(torch.isfinite(norms) & (self._norms == self._norms), norms, self._norms))


def _unit(gradient: Tensor) -> Tensor:
    """A scalar by which to divide a gradient, so that products of half precision neither overflow nor vanish."""
    if not gradient.numel():
        return gradient.new_ones(())
    largest = gradient.abs().amax()
    return torch.where(largest > 0, largest, torch.ones_like(largest))
