"""Scores that wait for the end of their pass, and keep more of a sample than the score."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..core.distributed import Group
from ..core.score_rule import Columns, ScoreRule
from .held import HeldVisits

_HELD_DTYPES = (torch.int64, torch.float32, torch.float32)


class DeferredScore(ScoreRule):
    """Holds the losses of a pass until it ends.

    What a rule keeps of each sample beside its score cannot be taken back when processes exchange their records. Folded
    in once, when all records of the pass are known and in the order of their samples, it is equal on all processes.

    Args:
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.
    """

    defers = True
    state_version = 4
    #: What is kept of each sample: names and dtypes of tensors whose first dimension is the sample.
    KEPT: ClassVar[Mapping[str, torch.dtype]] = {}

    def __init__(self, group: Group = None) -> None:
        super().__init__(group)
        self._held = HeldVisits(torch.float32, group)
        self._kept: dict[str, Tensor] = {}  # until the first pass ends nobody says how many samples there are

    def kept_shape(self, name: str) -> tuple[int, ...]:
        """Shape of what is kept of one sample under a name. Defaults to a single number's."""
        return ()

    def make_kept(self, num_samples: int) -> None:
        """Make the tensors of :attr:`KEPT`, all zeros, unless they are there."""
        for name, dtype in self.KEPT.items():
            if name not in self._kept:
                shape = (num_samples, *self.kept_shape(name))
                self._kept[name] = torch.zeros(shape, dtype=dtype, device="cpu")

    @property
    def columns(self) -> Mapping[str, Tensor]:
        return {name: each for name, each in self._kept.items() if each.dim() == 1}

    # ---- what is held ---------------------------------------------------------------------------------

    def evidence(self, losses: Tensor, log_snr: Tensor | None) -> Tensor:
        return losses.detach().to(torch.float32, copy=True)

    def hold(self, indices: Tensor, losses: Tensor, evidence: Tensor) -> None:
        self._held.add(indices, losses, evidence)

    def merge(self) -> None:
        self._held.merge()

    def settle(self) -> tuple[Tensor, Tensor]:
        indices, losses, _ = self._held.take()
        return indices, losses

    @property
    def unmerged(self) -> bool:
        return self._held.unmerged

    # ---- state ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        held = dict(zip(("indices", "losses", "evidence"), self._held.peek(), strict=True))
        kept = {name: self._kept.get(name, torch.zeros(0, dtype=dtype)) for name, dtype in self.KEPT.items()}
        return {f"{self.name}_held": held, **{f"{self.name}_{name}": each.clone() for name, each in kept.items()}}

    @classmethod
    def damaged(cls, state: Mapping[str, Any], num_samples: int) -> str | None:
        held = state.get(f"{cls.name}_held")
        parts = [held.get(key) for key in ("indices", "losses", "evidence")] if isinstance(held, Mapping) else []
        if not _fits(parts, num_samples):
            return f"{cls.name}_held"
        for name, dtype in cls.KEPT.items():
            each = state.get(f"{cls.name}_{name}")
            if (
                not isinstance(each, Tensor)
                or each.dtype != dtype
                or each.dim() == 0
                or len(each) not in (0, num_samples)
                or not bool(torch.isfinite(each).all())
            ):
                return f"{cls.name}_{name}"
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        held = state[f"{self.name}_held"]
        self._held.put(held["indices"], held["losses"], held["evidence"])
        kept = {name: state[f"{self.name}_{name}"].cpu().clone() for name in self.KEPT}
        self._kept = {name: each for name, each in kept.items() if len(each)}


class BySampleScore(DeferredScore):
    """Folds in one loss of a sample after the other."""

    @abstractmethod
    def scored(self, at: np.ndarray, losses: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Take in one more loss of some samples, all different; returns their new scores.

        Args:
            at (ndarray): The samples, shape ``(V,)``, int64.
            losses (ndarray): Shape ``(V,)``, float64, finite.
            times (ndarray): How many losses each has had with this one, shape ``(V,)``, int32.
        """

    def fold(self, columns: Columns, where: np.ndarray, losses: np.ndarray) -> None:
        self.make_kept(len(columns.values))
        times = columns.times_seen.numpy()
        columns.seen.numpy()[where] = True
        for visits in _once_each(where):
            at = where[visits]
            times[at] += 1
            columns.values.numpy()[at] = at_most_largest(self.scored(at, losses[visits].astype(np.float64), times[at]))


def at_most_largest(values: np.ndarray) -> np.ndarray:
    """The same as float32, which squares of large losses would leave."""
    return np.minimum(values, np.finfo(np.float32).max).astype(np.float32)


def _once_each(where: np.ndarray) -> Iterator[np.ndarray]:
    """Places of visits in rounds: no sample twice in a round, and each one's visits in their order."""
    left = np.arange(len(where))
    while len(left):  # once, but for samples that were visited several times
        _, first = np.unique(where[left], return_index=True)
        yield left[first]
        left = np.delete(left, first)


def _fits(parts: list[Any], num_samples: int) -> bool:
    """Whether they are indices, losses and evidence of visits of so many samples."""
    if not parts or any(not isinstance(each, Tensor) for each in parts):
        return False
    indices, losses, evidence = parts
    return (
        tuple(each.dtype for each in parts) == _HELD_DTYPES
        and indices.dim() == 1
        and indices.shape == losses.shape == evidence.shape
        and not bool(((indices < 0) | (indices >= num_samples)).any())
        and bool((torch.isfinite(losses) & torch.isfinite(evidence)).all())
    )
