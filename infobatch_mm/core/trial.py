"""Calls of a user's collate function on copies of its items, of which nothing else takes notice."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from . import rng
from .rows import Column, pick, same, size, taken

_SALT = 0xC011A7E


class Trial:
    """Calls a collate function on copies of items, in any order and number, under seeds of its own.

    Args:
        collate_fn (Callable): The user's.
        bare (list): The items.
        number (int): Of the batch; part of the seed.
    """

    def __init__(self, collate_fn: Callable[[list], Any], bare: list, number: int) -> None:
        self.bare = bare
        self._collate_fn = collate_fn
        self._number = number
        self._drawn = 0

    def __call__(self, places: Sequence[int], seed: int = 0) -> Any:
        items = [_copied(self.bare[place]) for place in places]
        with rng.seeded((_SALT, self._number, seed)):
            try:
                batch = self._collate_fn(items)
            except Exception as error:
                raise TrialError from error
            self._drawn = _state_of_generators()
        return batch

    def rows(self, places: Sequence[int], column: Column) -> int:
        """How many rows a choice of the items gives; 0 where the function fails on it."""
        try:
            return size(self(places), column) or 0
        except TrialError:
            return 0

    def gives(self, places: Sequence[int], batch: Any, columns: list[Column]) -> bool:
        """Whether a choice of the items gives the columns of a batch."""
        try:
            return agree(self(places), batch, columns)
        except TrialError:
            return False

    def mixed(self, columns: list[Column], start: list[int], place: int) -> list[Column]:
        """Which random columns hold other samples in a sample's row, as of Mixup or a shuffle, not of masks.

        A row among other samples is compared with that row among copies of its sample. Where the function draws from
        the generators seeded here, and as often, they must agree; where it draws elsewhere, one of them at least must
        be as random as the other.
        """
        runs = []
        for seed in range(3):
            among_others, drawn = self(start, seed), self._drawn
            among_copies = self([place] * len(start), seed)
            runs.append((among_others, among_copies, drawn == self._drawn))
        again = self(start)

        def is_mixed(column: Column) -> bool:
            def row(batch: Any) -> Any:
                rows = pick(batch, column)
                if rows is None or (size(batch, column) or 0) <= place:
                    return None
                return taken(rows, [place], column.axes[:1])

            others, copies = [row(other) for other, _, _ in runs], [row(copy) for _, copy, _ in runs]
            if same(pick(again, column), pick(runs[0][0], column)):
                pairs = zip(others, copies, runs, strict=True)
                return any(even and _shape(a) == _shape(b) and not same(a, b) for a, b, (_, _, even) in pairs)
            differ = not any(same(others[i], others[i - 1]) for i in range(3))
            return differ and all(same(copies[0], other) for other in copies[1:])

        return [column for column in columns if is_mixed(column)]


class TrialError(Exception):
    """The user's function failed on copies."""


def agree(one: Any, other: Any, columns: list[Column]) -> bool:
    """Whether two batches have the same columns."""
    return all(same(pick(one, column), pick(other, column)) for column in columns)


@contextmanager
def undisturbed(collate_fn: Any) -> Iterator[None]:
    """Put back what a collate function keeps from call to call: its attributes, and generators of its own."""
    held: list[Any] = []
    while isinstance(collate_fn, functools.partial):
        held += [*collate_fn.args, *collate_fn.keywords.values()]
        collate_fn = collate_fn.func
    attributes = getattr(getattr(collate_fn, "__self__", collate_fn), "__dict__", {})
    before = dict(attributes)
    cells = [cell for cell in getattr(collate_fn, "__closure__", None) or () if cell != type(cell)()]
    held += [*before.values(), *(cell.cell_contents for cell in cells)]
    put_back = [found for value in held if (found := _resetting(value)) is not None]
    try:
        yield
    finally:
        if isinstance(attributes, dict):  # of a class it cannot be written
            attributes.update(before)
        for reset in put_back:
            reset()


def _resetting(value: Any) -> Callable[[], Any] | None:
    """Puts a generator back to where it is now."""
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state", copy.deepcopy(value.bit_generator.state))
    if isinstance(value, torch.Generator) and value.device.type == "cpu":  # a forked worker may not touch others
        return functools.partial(value.set_state, value.get_state())
    return None


def _copied(item: Any) -> Any:
    for copied in (copy.deepcopy, copy.copy):
        try:
            return copied(item)
        except Exception:  # an item of the user's that cannot be copied, or not as deep
            continue
    return item


def _shape(rows: Any) -> Any:
    return getattr(rows, "shape", None)


def _state_of_generators() -> int:
    """A number that tells how many draws were made from the generators of the CPU."""
    name, keys, *rest = np.random.get_state()
    return hash((random.getstate(), name, np.asarray(keys).tobytes(), *rest, torch.get_rng_state().numpy().tobytes()))
