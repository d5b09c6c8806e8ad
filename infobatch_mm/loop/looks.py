"""Losses of samples that were looked at several times in a pass, and what counts of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Looks:
    """Losses that were weighed in one walk, on the CPU.

    Attributes:
        index (ndarray): Sample indices, shape ``(L,)``, int64.
        losses (Tensor): Shape ``(L,)``, float32.
        level (Tensor, optional): Log-SNR of each, shape ``(L,)``, float32.
        call (ndarray): Number of the call that each was weighed in, shape ``(L,)``, int64, ascending.
    """

    index: np.ndarray
    losses: Tensor
    level: Tensor | None
    call: np.ndarray

    def at(self, places: np.ndarray) -> Looks:
        """The looks at some places, given as numbers or as a mask."""
        where = torch.from_numpy(places)
        level = None if self.level is None else self.level[where]
        return Looks(self.index[places], self.losses[where], level, self.call[places])


def one_loss_each(looks: Looks, average: bool, missing: np.ndarray | None = None) -> tuple[np.ndarray, Looks]:
    """The losses by which samples are scored: each sample's in the first call that it was in.

    A sample that was in a call several times, as in two views of a batch, has the mean of its losses there. What it
    had in a later call, as optimisers that evaluate twice make, is no second visit.

    Args:
        looks (Looks): All of them, with real indices.
        average (bool): Whether to average; otherwise all losses of that call are kept, for scores that are averages
            of shares of a noise level: several looks at a sample are at a level each.
        missing (ndarray, optional): Looks that count only where a sample has no other, shape ``(L,)``, bool. Defaults
            to none.

    Returns:
        tuple: Different sample indices, shape ``(V,)``, int64, in ascending order; and the looks that count, in the
        order of their samples, one for each where they are averaged.
    """
    # Of equal indices the first call comes first.
    keys = (looks.index,) if missing is None else (missing, looks.index)
    order = np.lexsort(keys)
    ordered = looks.at(order)
    first = _starts(ordered.index)
    samples = ordered.index[first]
    if len(first) < len(order):
        counts = np.diff(first, append=len(order))
        ordered = ordered.at(ordered.call == np.repeat(ordered.call[first], counts))
        first = _starts(ordered.index)
    if average and len(first) < len(ordered.index):
        counts = np.diff(first, append=len(ordered.index))
        means = (np.add.reduceat(ordered.losses.numpy(), first) / counts).astype(np.float32)
        ordered = replace(ordered.at(first), losses=torch.from_numpy(means))
    return samples, ordered


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin."""
    return np.flatnonzero(np.diff(ordered, prepend=-1))
