"""The arguments of a host's loss, taken apart by sample.

A host calls its losses with nested lists of tensors and data samples. Here is the one place that knows
which axis of which part is the batch's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

#: Batch axes of predictions that are stacked over the layers of a decoder: these come first.
LAYERS_FIRST = {
    name: 1 for name in ("all_layers_cls_scores", "all_layers_bbox_preds", "all_cls_scores", "all_mask_preds")
}


class BatchedArguments:
    """Arguments of one call, by parameter name, with the batch's axis of each part.

    Batched are: tensors of size B along their first axis (or the axis given), lists of such tensors
    (levels of a pyramid), lists of B other things (data samples, images' sizes), plain dicts of these, and tensors
    whose rows belong to the samples as ``rows`` says. All else is shared by the samples.

    Args:
        arguments (Mapping): Parameter name to value.
        batch_size (int): Number B of samples.
        axes (Mapping, optional): Parameter name to the batch's axis of its tensor, where it is not the
            first; None for a parameter that all samples share. Lists are entered: their tensors have the
            batch first.
        rows (Mapping, optional): Parameter name to the numbers of consecutive rows of the B samples.
        writable (bool): Whether the samples' tensors are copies, which a head may write into. Defaults to
            True.

    Raises:
        ValueError: If a tensor that carries a gradient has no batch axis, or none carries one.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        batch_size: int,
        axes: Mapping[str, int | None] | None = None,
        rows: Mapping[str, list[int]] | None = None,
        writable: bool = True,
    ) -> None:
        self.arguments = arguments
        self.batch_size = batch_size
        self._axes, self._rows = axes or {}, rows or {}
        self._writable = writable

    @property
    def has_rows(self) -> bool:
        """Whether rows of some tensor belong to the samples in numbers of their own."""
        return bool(self._rows)

    def samples(self) -> list[dict[str, Any]]:
        """The arguments of each sample alone: B times a batch of one.

        Data samples are shallow copies: heads write into them.
        """
        pieces = self._map(self._split, lambda values: _Pieces([like(values, [value]) for value in values]))
        pieces = self._for_one(pieces)
        return [{name: _pick(value, i) for name, value in pieces.items()} for i in range(self.batch_size)]

    def _for_one(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Copy the arguments with ``avg_factor=1``, so that a lone sample is not divided by the batch size."""
        given: dict[str, Any] = {name: self._for_one(value) for name, value in arguments.items() if type(value) is dict}
        divisor = arguments.get("avg_factor")
        if isinstance(divisor, (int, float)) and divisor == self.batch_size:
            given["avg_factor"] = 1
        return {**arguments, **given}

    def mapped(self, function: Callable[[Tensor, int, list[int] | None], Tensor]) -> dict[str, Any]:
        """The arguments with ``function(tensor, axis, rows)`` in place of each batched tensor with gradient."""
        return self._map(
            lambda tensor, axis, rows: function(tensor, axis, rows) if tensor.requires_grad else tensor,
            lambda values: values,
        )

    def reordered(self, order: list[int]) -> dict[str, Any]:
        """The arguments of a batch of these samples in this order."""

        def taken(tensor: Tensor, axis: int, rows: list[int] | None) -> Tensor:
            if rows is not None:
                pieces = tensor.split(rows, axis)
                return torch.cat([pieces[i] for i in order], axis)
            return tensor.index_select(axis, torch.tensor(order, dtype=torch.int64, device=tensor.device))

        return self._map(taken, lambda values: _shallow(like(values, [values[i] for i in order])))

    def predictions(self) -> list[tuple[Tensor, int]]:
        """Batched tensors that carry a gradient, each with its batch axis; not for arguments with ``rows``."""
        found: list[tuple[Tensor, int]] = []

        def collect(tensor: Tensor, axis: int, rows: list[int] | None) -> Tensor:
            if tensor.requires_grad:
                found.append((tensor, axis))
            return tensor

        self._map(collect, lambda values: values)
        return found

    @property
    def device_type(self) -> str:
        """Where the predictions are: 'cpu', 'cuda', ..."""
        predictions = self.predictions()
        return predictions[0][0].device.type if predictions else "cpu"

    def with_predictions(self, function: Callable[[Tensor, int, list[int] | None], Tensor]) -> BatchedArguments:
        """The same arguments, as :meth:`mapped` gives them, to be taken apart."""
        return BatchedArguments(self.mapped(function), self.batch_size, self._axes, self._rows, self._writable)

    def in_float32(self) -> BatchedArguments:
        """The same arguments with predictions in single precision."""
        return self.with_predictions(lambda tensor, axis, rows: tensor.float())

    def check(self) -> None:
        """Raise a ValueError if a prediction cannot be told apart by sample, or if there is none."""
        if not self.predictions():
            raise ValueError(f"none of {', '.join(self.arguments)} is a prediction with {self.batch_size} rows")

    def _split(self, tensor: Tensor, axis: int, rows: list[int] | None) -> _Pieces:
        # split() and not slices: its backward is one concatenation instead of B tensors of zeros.
        pieces = tensor.split(1 if rows is None else rows, axis)
        return _Pieces([piece.clone() for piece in pieces] if self._writable else pieces)

    def _map(self, on_tensor: Callable, on_list: Callable) -> dict[str, Any]:
        mapped = {}
        for name, value in self.arguments.items():
            rows = self._rows.get(name)
            if isinstance(value, Tensor) and rows is not None:
                if len(rows) != self.batch_size or sum(rows) != len(value):
                    raise ValueError(f"{name} has {len(value)} rows, which are not those of its samples: {rows}")
                mapped[name] = on_tensor(value, 0, rows)
            elif name in self._axes and self._axes[name] is None:
                mapped[name] = value
            else:
                axis = (self._axes.get(name) or 0) if isinstance(value, Tensor) else 0
                mapped[name] = self._map_value(name, value, axis, on_tensor, on_list)
        return mapped

    def _map_value(self, name: str, value: Any, axis: int, on_tensor: Callable, on_list: Callable) -> Any:
        def enter(each: Any) -> Any:
            return self._map_value(name, each, 0, on_tensor, on_list)

        if isinstance(value, Tensor):
            if value.dim() > axis and value.shape[axis] == self.batch_size:
                return on_tensor(value, axis, None)
            if value.requires_grad:
                raise ValueError(
                    f"{name} is a prediction of shape {tuple(value.shape)}, expected {self.batch_size} rows along "
                    f"axis {axis}, one for each sample"
                )
            return value
        if isinstance(value, (list, tuple)) and value:
            if _carries_gradient(value) or all(self._is_batched(each) for each in value):
                return like(value, [enter(each) for each in value])
            settings = any(isinstance(each, (int, float, str)) for each in value)
            return on_list(value) if len(value) == self.batch_size and not settings else value
        if type(value) is dict:  # and not a ConfigDict: settings are shared
            return {key: enter(each) for key, each in value.items()}
        return value

    def _is_batched(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.batch_size


def have_instances(head: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
    """Which images have something to find, shape ``(B,)``, bool; None if the head is not given instances."""
    instances = arguments.get("batch_gt_instances")
    return None if instances is None else bools([len(each) > 0 for each in instances])


def bools(values: list[bool]) -> Tensor:
    """The values on the CPU, whatever torch's default device is."""
    return torch.tensor(values, dtype=torch.bool, device="cpu")


class _Pieces(list):
    """One entry for each sample."""


def _pick(value: Any, i: int) -> Any:
    if isinstance(value, _Pieces):
        return _shallow(value[i])
    if isinstance(value, (list, tuple)):
        return like(value, [_pick(each, i) for each in value])
    if type(value) is dict:
        return {key: _pick(each, i) for key, each in value.items()}
    return value


def _shallow(value: Any) -> Any:
    """Copies of the data samples in a list, which share their tensors."""
    if isinstance(value, (list, tuple)):
        return like(value, [_shallow(each) for each in value])
    if isinstance(value, BaseDataElement):
        return value.new()
    return copy.copy(value) if isinstance(value, dict) else value


def like(original: list | tuple, values: list) -> Any:
    """The values as a sequence of the original's type."""
    if isinstance(original, tuple):
        return type(original)(*values) if hasattr(original, "_fields") else tuple(values)
    return values


def _carries_gradient(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, (list, tuple)) and any(_carries_gradient(each) for each in value)


def stack_scalars(values: list[Tensor]) -> Tensor:
    """The losses of the samples, scalars, as one tensor of shape ``(B,)``, at least float32."""
    stacked = torch.stack(values)
    return stacked.to(torch.promote_types(stacked.dtype, torch.float32))
