"""Visits that gave no score: how many, and of which samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .distributed import Group, all_gather_ragged, world_size

#: Marks of a sample: it had a visit without a valid pixel, one with a loss that is NaN or infinite.
_BLANK, _NONFINITE = 1, 2


class UnusableVisits:
    """Counts visits that gave no score, and remembers their samples.

    Args:
        num_samples (int): Size N of the data set.
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.

    Attributes:
        num_nonfinite (int): Visits whose loss was NaN or infinite.
        num_invalid (int): Visits without a valid pixel, or of a replaced sample.
    """

    def __init__(self, num_samples: int, group: Group = None) -> None:
        self._group = group
        self._marks = torch.zeros(num_samples, dtype=torch.uint8, device="cpu")
        self.num_nonfinite = 0
        self.num_invalid = 0
        self._own: list[Tensor] = []  # visits that the other ranks do not know yet: 4 * index + mark

    @property
    def blank(self) -> Tensor:
        """Samples that had a visit without a valid pixel, shape ``(N,)``, bool."""
        return (self._marks & _BLANK).to(torch.bool)

    @property
    def samples(self) -> Tensor:
        """Samples that had a visit which gave no score, shape ``(N,)``, bool."""
        return self._marks.to(torch.bool)

    def record(self, blank: Tensor, nonfinite: Tensor) -> None:
        """Take down visits, by the indices of their samples.

        Args:
            blank (Tensor): Visits without a valid pixel, shape ``(V,)``, int64, on the CPU.
            nonfinite (Tensor): Visits whose loss was NaN or infinite, alike.
        """
        codes = torch.cat([4 * blank + _BLANK, 4 * nonfinite + _NONFINITE])
        if len(codes):
            self._take(codes)
            if world_size(self._group) > 1:
                self._own.append(codes)

    def merge(self) -> None:
        """Exchange what each rank has taken down since the last merge; every rank must call it."""
        if world_size(self._group) == 1:
            return
        own = torch.cat(self._own) if self._own else torch.empty(0, dtype=torch.int64, device="cpu")
        everyones = torch.cat(all_gather_ragged(own, self._group))
        self._count(own, -1)
        self._take(everyones)
        self._own = []

    def _take(self, codes: Tensor) -> None:
        self._count(codes, 1)
        samples, marks = codes // 4, (codes % 4).to(torch.uint8)
        for mark in (_BLANK, _NONFINITE):
            self._marks[samples[marks == mark]] |= mark

    def _count(self, codes: Tensor, sign: int) -> None:
        blank = int(torch.count_nonzero(codes % 4 == _BLANK))
        self.num_invalid += sign * blank
        self.num_nonfinite += sign * (len(codes) - blank)

    def state_dict(self) -> dict[str, Any]:
        """Counts and marks, as plain tensors and numbers."""
        return {
            "num_nonfinite": self.num_nonfinite,
            "num_invalid": self.num_invalid,
            "unusable": self._marks.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; earlier versions have counts only."""
        self._own = []
        self.num_nonfinite, self.num_invalid = int(state["num_nonfinite"]), int(state["num_invalid"])
        self._marks.zero_()
        if "unusable" in state:
            self._marks.copy_(state["unusable"])


def fits(marks: Any, num_samples: int) -> bool:
    """Whether they are the marks of so many samples."""
    return (
        isinstance(marks, Tensor)
        and marks.dtype == torch.uint8
        and marks.shape == (num_samples,)
        and not bool((marks > _BLANK + _NONFINITE).any())
    )
