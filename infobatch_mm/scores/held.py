"""Visits that wait for the end of their pass: this process's, and what the others have told of theirs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..core.distributed import Group, all_gather_ragged, world_size

#: Indices, losses, and what is kept beside each loss.
Visits = tuple[Tensor, Tensor, Tensor]


class HeldVisits:
    """Holds visits on the CPU.

    Args:
        beside (torch.dtype): Of what is kept beside each loss; indices are int64, losses float32.
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.
    """

    def __init__(self, beside: torch.dtype, group: Group = None) -> None:
        self._dtypes, self._group = (torch.int64, torch.float32, beside), group
        self._own: list[Visits] = []  # this rank's, which the others do not know
        self._merged: list[Visits] = []

    def add(self, indices: Tensor, losses: Tensor, beside: Tensor) -> None:
        """Hold visits of this process, shape ``(V,)`` each."""
        self._own.append((indices, losses, beside))

    def merge(self) -> None:
        """Exchange what is held; every rank must call it."""
        if world_size(self._group) == 1:
            return
        parts = [all_gather_ragged(each, self._group) for each in self._joined(self._own)]
        self._merged.extend(zip(*parts, strict=True))
        self._own = []

    @property
    def unmerged(self) -> bool:
        """Whether this rank holds visits that the other ranks have not seen yet."""
        return world_size(self._group) > 1 and bool(self._own)

    def take(self) -> Visits:
        """All that is held, which is then forgotten, in the order of the samples.

        In this order sums are equal to the bit however the visits were shared out.
        """
        visits = self.peek()
        self._own, self._merged = [], []
        order = torch.from_numpy(np.argsort(visits[0].numpy(), kind="stable"))
        indices, losses, beside = (each[order] for each in visits)
        return indices, losses, beside

    def peek(self) -> Visits:
        """All that is held, as it came."""
        return self._joined([*self._merged, *self._own])

    def put(self, indices: Tensor, losses: Tensor, beside: Tensor) -> None:
        """Hold these visits and no others: what a checkpoint has of all processes."""
        self._own, self._merged = [], [(indices.cpu(), losses.cpu(), beside.cpu())]

    def _joined(self, held: list[Visits]) -> Visits:
        if not held:
            indices, losses, beside = (torch.empty(0, dtype=dtype, device="cpu") for dtype in self._dtypes)
            return indices, losses, beside
        indices, losses, beside = (torch.cat(each) for each in zip(*held, strict=True))
        return indices, losses, beside
