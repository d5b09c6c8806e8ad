"""Samplers that walk a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.data import Sampler

from . import rng
from .pruner import Pruner

# Indices become Python integers in blocks, so that a pass over 10**8 samples never holds them all.
_BLOCK = 1 << 16


def stride(indices: Tensor, rank: int, world: int) -> Tensor:
    """Share of one process: every ``world``-th visit from ``rank`` on."""
    return indices[rank::world] if world > 1 else indices


def filled_up(indices: Tensor, multiple_of: int) -> Tensor:
    """Visits up to a multiple, the first ones repeated."""
    missing = -len(indices) % multiple_of
    if not missing:
        return indices
    return torch.cat([indices, indices.repeat(math.ceil(missing / len(indices)))[:missing]])


class SeededIndex(int):
    """A sample index that carries the seed under which its item is to be read.

    An integer to everything else: batch samplers, workers, other wrappers of the data set.

    Attributes:
        seed (tuple[int, ...]): Seed of the run, pass, position in the plan; for :func:`.rng.seeded`.
    """

    seed: tuple[int, ...]

    def __new__(cls, index: int, seed: tuple[int, ...]) -> SeededIndex:
        """An index with its seed."""
        self = super().__new__(cls, index)
        self.seed = seed
        return self

    def __reduce__(self) -> tuple[type, tuple[int, tuple[int, ...]]]:
        return type(self), (int(self), self.seed)


def item_seed(index: int) -> AbstractContextManager[None]:
    """Where an index carries a seed, read its item under it; otherwise in the generators as they are."""
    return rng.seeded(index.seed) if isinstance(index, SeededIndex) else nullcontext()


class PlanSampler(Sampler[int]):
    """Walks the plan of the current pass from its first unvisited position, this process's share of it.

    A plan that does not divide among the processes (only full passes can be such) is rounded up by
    repeating its first visits, as the hosts' samplers do, unless ``round_up`` is False.

    Args:
        pruner (Pruner): Whose plan to walk.
        rank (int): This process. Defaults to 0.
        world (int): Number of processes. Defaults to 1.
        round_up (bool): Whether every process gets the same number of visits. Defaults to True.
        repeats (int): Repeated augmentation (Hoffer et al., CVPR 2020): as many visits as the plan has, of so
            many times fewer samples, each repeated one after the other. Which samples is the plan's random
            order, so that the expected visits of each are the plan's. Defaults to 1.
    """

    def __init__(self, pruner: Pruner, rank: int = 0, world: int = 1, round_up: bool = True, repeats: int = 1) -> None:
        self.pruner = pruner
        self.rank = rank
        self.world = world
        self.round_up = round_up
        self.repeats = repeats

    def __iter__(self) -> Iterator[int]:
        """Walk the rest of the pass; draws its plan if there is none in flight."""
        pruner = self.pruner
        start = self._first_position()
        indices = self._share(self._repeated(pruner.begin_pass().indices))[start:]
        for block in indices.split(_BLOCK):
            yield from self._with_seeds(block.tolist(), start) if pruner.item_seed else block.tolist()
            start += len(block)

    def _first_position(self) -> int:
        """Where a walk of this process's share begins."""
        return self.pruner.visited // self.world

    def _with_seeds(self, indices: list[int], start: int) -> Iterator[SeededIndex]:
        run, current = self.pruner.seed, self.pruner.pass_index
        for own_position, index in enumerate(indices, start):
            yield SeededIndex(index, (run, current, own_position * self.world + self.rank))

    def __len__(self) -> int:
        """Visits of this process in the whole pass that is being walked or about to be.

        Draws its plan if there is none in flight, but never ends a pass: where a ``drop_last`` loader left a
        tail unweighed, it is the pass of that tail until the next walk starts.
        """
        return self._share_of(len(self.pruner.begin_pass()))

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the pruner knows its pass. Present because hosts call it."""

    def _share_of(self, visits: int) -> int:
        return math.ceil((visits - (0 if self.round_up else self.rank)) / self.world)

    def _repeated(self, indices: Tensor) -> Tensor:
        if self.repeats == 1:
            return indices
        visits = len(indices)
        if self.round_up:  # by the next copies, as the host does
            visits = self._share_of(visits) * self.world
        return indices[: math.ceil(visits / self.repeats)].repeat_interleave(self.repeats)[:visits]

    def _share(self, indices: Tensor) -> Tensor:
        if self.round_up:
            indices = filled_up(indices, self.world)
        return stride(indices, self.rank, self.world)
