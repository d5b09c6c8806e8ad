"""Where a collated batch of any structure has one row per sample, and whether its rows follow the samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

#: Tensors that numpy has no type for.
_NOT_OF_NUMPY = {torch.bfloat16, *(getattr(torch, name) for name in dir(torch) if name.startswith("float8"))}
_DEEPEST = 8  # objects may hold each other in a circle


class Column(NamedTuple):
    """A part of a batch that has one row per sample.

    Attributes:
        path (tuple): Keys, positions and attributes down to a tensor, an array or a list of rows. A list of rows is
            ``...``; what comes after it is the path within each row.
        axes (tuple[int, ...]): Axes of the tensor or array over the samples; ``(0,)`` for a list.
        times (int): Rows to a sample: 1, unless a collate function multiplies its samples.
    """

    path: tuple
    axes: tuple[int, ...]
    times: int

    def __str__(self) -> str:
        return ".".join("[]" if step is ... else str(step) for step in self.path) or "the batch"


def find_columns(full: Any, less: Any, count: int, path: tuple = ()) -> Iterator[Column]:
    """What has one row per sample, or several.

    Args:
        full: A batch of ``count`` copies of one sample. Copies are all of one length, so that an axis over time or
            the tokens of all samples together is told from one over samples, also where both are as long.
        less: A batch of one copy less.
        count (int): At least 2.
        path (tuple): Where in the batch these are. Defaults to its root.
    """
    full, less = _plain(full), _plain(less)
    array, smaller = _array(full), _array(less)
    if array is not None:
        lengths = zip(array.shape, () if smaller is None else smaller.shape, strict=False)
        times = [_times(long, short, count) for long, short in lengths]
        for number in sorted({number for number in times if number}):
            yield Column(path, tuple(axis for axis, found in enumerate(times) if found == number), number)
    elif _is_list(full) and _is_list(less) and (number := _times(len(full), len(less), count)):
        yield from (Column((*path, ..., *inner), (0,), number) for inner in _paths_in(full[0]))
    elif len(path) < _DEEPEST:
        parts, others = _parts(full) or {}, _parts(less) or {}
        for key in parts:
            if key in others:
                yield from find_columns(parts[key], others[key], count, (*path, key))


def pick(batch: Any, column: Column) -> np.ndarray | list | None:
    """The rows of a column; None where this batch has no such part."""
    holder, inner = _walk(batch, column.path)
    if not inner:
        return _array(holder)
    return [_walk(row, inner[1:])[0] for row in holder] if _is_list(holder) else None


def size(batch: Any, column: Column) -> int | None:
    """Number of rows of a column, without a copy; None where this batch has no such part."""
    holder, inner = _walk(batch, column.path)
    if inner or not hasattr(holder, "shape"):
        return len(holder) if _is_list(holder) else None
    sizes = {holder.shape[axis] for axis in column.axes if axis < len(holder.shape)}
    return sizes.pop() if len(sizes) == 1 else None


def taken(rows: np.ndarray | list, order: Sequence[int], axes: tuple[int, ...] = (0,)) -> np.ndarray | list:
    """Rows in another order, along all of the axes at once."""
    if isinstance(rows, list):
        return [rows[place] for place in order]
    for axis in axes:
        rows = np.take(rows, order, axis)
    return rows


def follows(column: Column, batch: Any, moved: list[tuple[list[int], Any]], still: Any = None) -> bool | None:
    """Whether a column's rows are in the order of the samples.

    Args:
        column (Column): Which one.
        batch: Of some samples.
        moved (list): Pairs of an order and the batch of the same samples in it.
        still (optional): A batch of as many copies of one sample: what is the same there, such as the place of a row
            in its batch, tells samples from each other no more than what has no row of its own.

    Returns:
        bool | None: Whether they are; None where they are too much alike to tell.
    """
    rows, others = pick(batch, column), [pick(other, column) for _, other in moved]
    if rows is None:
        return None
    if still is not None:
        idle = pick(still, column)
        if same(rows, idle):
            return None
        if _are_numbers(rows, idle, *others):
            alike = np.all(np.equal(rows, idle), axis=column.axes, keepdims=True)
            rows, *others = [np.where(alike, 0, values) for values in (rows, *others)]
    # Pairs of samples, as in a matrix of their distances, follow along both axes together.
    for number in range(1, len(column.axes) + 1):
        for axes in combinations(column.axes, number):
            expected = [taken(rows, order, axes) for order, _ in moved]
            if all(same(got, wanted) for got, wanted in zip(others, expected, strict=True)):
                return True if not any(same(rows, wanted) for wanted in expected) else None
    return False


def same(one: Any, other: Any, depth: int = 0) -> bool:
    """Whether two values of any structure are equal: NaN to NaN, and floats up to the rounding of a few operations."""
    one, other = _plain(one), _plain(other)
    array, second = _array(one), _array(other)
    if array is not None or second is not None:
        return array is not None and second is not None and array.shape == second.shape and _close(array, second)
    parts, others = _parts(one), _parts(other)
    if parts is None or others is None or _knows_its_equals(one):
        try:
            if one == other:
                return True
        except Exception:  # a class of the user's that holds tensors: they are looked at below
            pass
    return (
        parts is not None
        and others is not None
        and depth < _DEEPEST
        and parts.keys() == others.keys()
        and all(same(value, others[key], depth + 1) for key, value in parts.items())
    )


def _close(one: np.ndarray, other: np.ndarray) -> bool:
    if np.array_equal(one, other):
        return True
    if one.dtype.kind not in "fc" or other.dtype.kind not in "fc":
        return False
    with np.errstate(all="ignore"):
        largest = np.abs(np.where(np.isfinite(one), one, 0)).max()
        bound = 8 * np.finfo(one.dtype).eps * largest
        return bool(((np.abs(one - other) <= bound) | (one == other) | (np.isnan(one) & np.isnan(other))).all())


def _times(long: int, short: int, count: int) -> int:
    return long // count if long * (count - 1) == short * count else 0


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _are_numbers(*values: Any) -> bool:
    kinds = all(isinstance(value, np.ndarray) and value.dtype.kind in "biufc" for value in values)
    return kinds and len({value.shape for value in values}) == 1


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_nested:
        return list(value.unbind())
    if isinstance(value, np.ndarray) and value.dtype.kind == "O":
        return list(value) if value.ndim else value.item()
    return value


def _array(value: Any) -> np.ndarray | None:
    if isinstance(value, torch.Tensor):
        value = value.detach() if value.layout is torch.strided else value.detach().to_dense()
        return (value.float() if value.dtype in _NOT_OF_NUMPY else value).numpy(force=True)
    if isinstance(value, (bool, int, float, complex, np.generic)):
        return np.asarray(value)
    if _is_list(value) and value and all(isinstance(item, (bool, int, float, np.generic)) for item in value):
        return np.asarray(value)
    return value if isinstance(value, np.ndarray) else None


def _parts(value: Any) -> dict | None:
    """What a container holds, by key; None for what is none."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, PackedSequence):  # sorts inside, and says how
        return dict(enumerate(pad_packed_sequence(value)))
    if _is_list(value):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return vars(value) if hasattr(value, "__dict__") and not callable(value) else None


def _knows_its_equals(value: Any) -> bool:
    """Whether an object, such as an image of Pillow, is more than the attributes it shows."""
    is_container = isinstance(value, Mapping) or _is_list(value) or dataclasses.is_dataclass(value)
    return not is_container and type(value).__eq__ is not object.__eq__


def _walk(value: Any, path: tuple) -> tuple[Any, tuple]:
    """What a path leads to, and the rest of the path from a list of rows on; None if it leads nowhere."""
    for depth, step in enumerate(path):
        value = _plain(value)
        if step is ...:
            return value, path[depth:]
        value = (_parts(value) or {}).get(step)
    return _plain(value), ()


def _paths_in(row: Any, path: tuple = ()) -> Iterator[tuple]:
    """What a row of a list is made of; an inner list is one value, of any length."""
    row = _plain(row)
    is_whole = isinstance(row, list) or _array(row) is not None or _knows_its_equals(row) or len(path) > _DEEPEST
    parts = None if is_whole else _parts(row)
    if parts is None:
        yield path
    for key, value in (parts or {}).items():
        yield from _paths_in(value, (*path, key))
