"""Collate functions that carry the indices of their samples, proven to keep their order.

Indices are taken off the items before the user's function is called, and belong to the rows it returns. One that sorts
by length would give weights and scores to the wrong samples, silently. So it is called on copies of the items in other
orders as well: whatever it returns one row of per sample must follow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .rows import Column, find_columns, follows, pick, same, size
from .trial import Trial, TrialError, agree, undisturbed

#: Modules whose functions are known to keep the order.
_TRUSTED = ("torch.utils.data", "mmengine.dataset", "transformers.data.data_collator")
_WAY_OUT = (
    "return one row for each item, in their order; or mark the function with infobatch_mm.keeps_order if it does; or "
    "train without pruning"
)
_UNKNOWN = ", and which it dropped cannot be made out"


def keeps_order(collate_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a collate function that keeps the order of its samples, so that no proof is asked of it; also a decorator.

    Args:
        collate_fn (Callable): Returns one row for each item that it is given, in their order.

    Returns:
        Callable: The same function; an object that calls it, where it takes no attributes.
    """
    if _is_trusted(collate_fn):
        return collate_fn
    try:
        collate_fn.keeps_order = True  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        return _Marked(collate_fn)
    return collate_fn


class IndexedCollate:
    """Collates bare items as the user does, and their indices beside them.

    The user's function is called for real once per batch, on the items themselves, and what it returns is handed
    through. Before that it is tried on copies in other orders, under seeds of its own, until its order is proven; and
    again at the 2nd, 4th, 8th ... batch, to find a sort that changed nothing so far. Functions of torch, MMEngine and
    Transformers, and those marked by :func:`keeps_order`, are trusted.

    Args:
        collate_fn (Callable): The user's; makes a batch of a list of items.
        drops (bool): Whether it may drop items, broken ones for example; then it is found out which. Defaults to
            False.

    Attributes:
        collate_fn (Callable): The user's.
    """

    def __init__(self, collate_fn: Callable[[list], Any], drops: bool = False) -> None:
        self.collate_fn = collate_fn
        self._drops = drops
        self._trusted = _is_trusted(collate_fn)
        self._columns: list[Column] = []  # what proved the order so far
        self._seen = 0

    def __call__(self, items: Sequence[tuple[int, Any]]) -> tuple[Tensor, Any]:
        """Collate items given as ``(index, item)``.

        Returns:
            tuple: Indices of the rows, in their order, shape ``(B,)``, int64; and the user's batch.

        Raises:
            ValueError: As :meth:`collate` describes.
        """
        indices, bare = zip(*items, strict=True)
        batch, kept = self.collate(list(bare))
        rows = indices if kept is None else [indices[place] for place in kept]
        return torch.tensor(rows, dtype=torch.int64, device="cpu"), batch

    def collate(self, bare: list) -> tuple[Any, list[int] | None]:
        """Collate bare items.

        Returns:
            tuple: The user's batch; and of which items its rows are, as places in ``bare``, or None for all of them.

        Raises:
            ValueError: If the user's function reorders or mixes samples, adds some, drops some where it may not or
                where it cannot be told which, or returns nothing by which its order could be verified.
        """
        kept, expected = None, None
        if not self._trusted and len(bare) > 1:
            self._seen += 1
            # One that fills up for broken items does so only where there are some.
            if not self._columns or self._is_due or any(item is None for item in bare):
                try:
                    with undisturbed(self.collate_fn):
                        kept, expected = self._prove(bare)
                except TrialError as error:
                    self.collate_fn(bare)  # where the items are at fault, its own error tells more
                    self._refuse(f"fails on copies of its samples, repeated or in another order ({error.__cause__!r})")
        batch = self.collate_fn(bare)
        return batch, self._counted(batch, bare, kept, expected) if self._columns else kept

    @property
    def _is_due(self) -> bool:
        return self._seen & (self._seen - 1) == 0

    # ---- order --------------------------------------------------------------------------------------

    def _prove(self, bare: list) -> tuple[list[int] | None, Any]:
        """Refuse a function that reorders these items.

        Returns which of them it keeps, None for all; and the batch to expect, if it drops some.
        """
        count = max(len(bare), 3)
        start = [min(place, len(bare) - 1) for place in range(count)]  # of two, each order is the mirror of the other
        trial = Trial(self.collate_fn, bare, self._seen)
        first = trial(start)
        known = [column for column in self._columns if size(first, column) is not None]
        columns, still, place = (known, None, 0) if known else self._find_columns(trial, count, first)
        if not columns:
            return ([] if self._drops and first is None else None), None  # all items are None
        whole = [column for column in columns if size(first, column) == count]
        if not whole:
            rows = size(first if len(bare) == count else trial(range(len(bare))), columns[0])
            kept, expected = self._survivors(trial, bare, columns, rows or 0)
            if kept and len(kept) > 1 and (self._is_due or not self._columns):
                self._prove([bare[place] for place in kept])
            return kept, expected
        # Rotation and swap generate all orders, so that nothing but the identity follows both.
        orders = [[*range(1, count), 0], [1, 0, *range(2, count)]]
        moved = [(order, trial([start[place] for place in order])) for order in orders]
        if known:
            if all(follows(column, first, moved) is not False for column in whole):
                return None, None
            columns, still, place = self._find_columns(trial, count, first)
            whole = [column for column in columns if size(first, column) == count]
        other = trial(start, seed=1)
        steady = {
            column: follows(column, first, moved, still)
            for column in whole
            if same(pick(first, column), pick(other, column))
        }
        wrong = [column for column, verdict in steady.items() if verdict is False]
        if len(steady) < len(whole) and not wrong:
            wrong = trial.mixed([column for column in whole if column not in steady], start, place)
        if wrong:
            raise ValueError(
                f"the collate function {_name(self.collate_fn)} reorders or mixes its samples (seen at {wrong[0]} of "
                "what it returns), so that weights and scores would go to the wrong ones: sort in the loop, together "
                f"with the index; or {_WAY_OUT}"
            )
        # Once proven, rows that happen to be random in one batch take nothing back; but some may stand in for no item.
        if not steady and (not known or any(item is None for item in bare)):
            self._refuse("draws at random whatever it returns one row of per sample")
        self._columns = [column for column, verdict in steady.items() if verdict] or self._columns
        return None, None

    def _find_columns(self, trial: Trial, count: int, first: Any) -> tuple[list[Column], Any, int]:
        """What has one row per sample, a batch of one sample repeated, and the place of that sample."""
        bare, failed = trial.bare, None
        multiples: list[set[int]] = []
        places = [place for place, item in enumerate(bare) if item is not None][:4]  # some of which may be broken
        for place in places:
            try:
                still, less = trial([place] * count), trial([place] * (count - 1))
            except TrialError as error:
                failed = error
                continue
            columns = list(find_columns(still, less, count))
            single = [column for column in columns if column.times == 1]
            if single:
                return single, still, place
            multiples.append({column.times for column in columns if size(first, column) == column.times * count})
        # What is as long as all samples together is a different multiple of samples of different lengths.
        if multiples and (times := set.intersection(*multiples)):
            self._refuse_count(max(times) * len(bare), len(bare))
        if failed is not None:
            raise failed
        if places:
            self._refuse("returns nothing that has one row for each of its samples")
        return [], None, 0

    # ---- number of rows -----------------------------------------------------------------------------

    def _counted(self, batch: Any, bare: list, kept: list[int] | None, expected: Any) -> list[int] | None:
        """Verify how many rows a batch has; returns of which items they are, None for all."""
        count = len(bare if kept is None else kept)
        if expected is not None and not agree(batch, expected, self._columns):
            self._refuse_count(count, len(bare), _UNKNOWN)
        if size(batch, self._columns[0]) == count:
            return kept
        sizes = {column: size(batch, column) for column in self._columns}
        rows = next((number for number in sizes.values() if number is not None), None)
        if len(bare) == 1 and batch is not None and rows != 0:  # a single row may have lost its axis to a squeeze
            return kept
        if count in sizes.values() or (rows is None and batch is not None):
            # The first turned out to have rows of something else; or the batch is of another kind, to be proven next.
            self._columns = [column for column, number in sizes.items() if number == count]
            return kept
        with undisturbed(self.collate_fn):
            trial = Trial(self.collate_fn, bare, self._seen)
            return self._survivors(trial, bare, self._columns, rows or 0, batch)[0]

    def _survivors(
        self, trial: Trial, bare: list, columns: list[Column], rows: int, batch: Any = None
    ) -> tuple[list[int] | None, Any]:
        """Which items a function kept that returned so many rows: alone they give the same batch."""
        count = len(bare)
        if rows == count:
            return None, None
        if rows > count or not self._drops:
            self._refuse_count(rows, count)
        if rows == 0:
            return [], None
        batch = trial(range(count)) if batch is None else batch
        kept = [place for place, item in enumerate(bare) if item is not None]
        if len(kept) == rows and trial.gives(kept, batch, columns):
            return kept, batch
        # Broken in another way: copies of it give no row, or fail.
        kept = [place for place in range(count) if trial.rows([place, place], columns[0])]
        if len(kept) == rows and trial.gives(kept, batch, columns):
            return kept, batch
        self._refuse_count(rows, count, _UNKNOWN)

    def _refuse(self, finding: str) -> NoReturn:
        name = _name(self.collate_fn)
        raise ValueError(f"the collate function {name} {finding}, so that its order cannot be verified: {_WAY_OUT}")

    def _refuse_count(self, rows: int, count: int, finding: str = "") -> NoReturn:
        prior = (
            f". If its first {count} rows are the samples', as with prior preservation, mark it with "
            "infobatch_mm.keeps_order and weigh their losses alone"
        )
        raise ValueError(
            f"the collate function {_name(self.collate_fn)} returned {rows} rows for {count} samples{finding}: return "
            "one row for each item, leave samples out of the data set, keep the views of a sample in its row, or train "
            f"without pruning{prior if rows > count and rows % count == 0 else ''}"
        )


class _Marked:
    """A function that takes no attributes, with the mark of :func:`keeps_order`."""

    keeps_order = True

    def __init__(self, collate_fn: Callable[..., Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.collate_fn(*args, **kwargs)


def _is_trusted(collate_fn: Any) -> bool:
    is_plain = True
    while isinstance(collate_fn, functools.partial) and not _is_marked(collate_fn):
        arguments = (*collate_fn.args, *collate_fn.keywords.values())
        # Other arguments may be functions that do the work, such as the collate_fn_map of torch.
        is_plain &= all(value is None or isinstance(value, (bool, int, float, str)) for value in arguments)
        collate_fn = collate_fn.func
    module = f"{_module(collate_fn)}."
    return _is_marked(collate_fn) or (is_plain and any(module.startswith(f"{name}.") for name in _TRUSTED))


def _is_marked(collate_fn: Any) -> bool:
    return getattr(collate_fn, "keeps_order", None) is True


def _module(collate_fn: Any) -> str:
    owner = getattr(collate_fn, "__self__", collate_fn)
    if isinstance(owner, type):
        return owner.__module__
    # Not its __module__: what wraps a function with functools.wraps calls itself by the name of that one.
    return getattr(owner, "__globals__", {}).get("__name__") or type(owner).__module__


def _name(collate_fn: Any) -> str:
    while isinstance(collate_fn, functools.partial):
        collate_fn = collate_fn.func
    named = collate_fn if hasattr(collate_fn, "__qualname__") else type(collate_fn)
    return f"{named.__module__}.{named.__qualname__}"
