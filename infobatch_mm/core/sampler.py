"""Samplers that walk a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from .pruner import Pruner

# Indices become Python integers in blocks, so that a pass over 10**8 samples never holds them all.
_BLOCK = 1 << 16


def stride(indices: Tensor, rank: int, world: int) -> Tensor:
    """Share of one process: every ``world``-th visit from ``rank`` on."""
    return indices[rank::world] if world > 1 else indices


class PlanSampler(Sampler[int]):
    """Walks the plan of the current pass from its first unvisited position, this process's share of it.

    A plan that does not divide among the processes (only full passes can be such) is rounded up by
    repeating its first visits, as the hosts' samplers do, unless ``round_up`` is False.

    Args:
        pruner (Pruner): Whose plan to walk.
        rank (int): This process. Defaults to 0.
        world (int): Number of processes. Defaults to 1.
        round_up (bool): Whether every process gets the same number of visits. Defaults to True.
    """

    def __init__(self, pruner: Pruner, rank: int = 0, world: int = 1, round_up: bool = True) -> None:
        self.pruner = pruner
        self.rank = rank
        self.world = world
        self.round_up = round_up

    def __iter__(self) -> Iterator[int]:
        """Walk the rest of the pass; draws its plan if there is none in flight."""
        indices = self._share(self.pruner.begin_pass().indices)[self.pruner.visited // self.world :]
        for block in indices.split(_BLOCK):
            yield from block.tolist()

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

    def _share(self, indices: Tensor) -> Tensor:
        missing = -len(indices) % self.world
        if missing and self.round_up:
            indices = torch.cat([indices, indices.repeat(math.ceil(missing / len(indices)))[:missing]])
        return stride(indices, self.rank, self.world)
