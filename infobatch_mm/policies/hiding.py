"""Policies that hide what a rule calls learned, but score it again from time to time."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from ..core.annealed import check_delta
from ..core.chances import Chances
from ..core.checks import whole_number
from ..core.policy import PruningPolicy, Snapshot
from .unweighted import unweighted


class HidingPolicy(PruningPolicy):
    """Leaves out the samples that a rule calls learned, unless it is their turn to be scored again.

    Methods that hide samples look at them all the same: they run a hidden sample forward in each pass, to notice when
    it is forgotten. A plan has visits only, so a sample may be hidden only in passes whose number plus its index is no
    multiple of ``rescore_every``. Its turn comes at the latest after that many passes, as a visit that is trained on,
    and is counted as one.

    Args:
        delta (float): Share of the training after which nothing is hidden, in (0, 1]. Defaults to 1.
        rescore_every (int): See above, at least 2. Defaults to 2: at most every other visit of a sample is saved.

    Raises:
        ValueError: If an argument is out of its range.
    """

    needs_scores = True
    unbiased = False

    def __init__(self, delta: float = 1.0, rescore_every: int = 2) -> None:
        check_delta(delta)
        self.delta = float(delta)
        meaning = "a hidden sample is visited again after so many passes; use 2"
        self.rescore_every = whole_number("rescore_every", rescore_every, 2, meaning)

    @abstractmethod
    def learned(self, snapshot: Snapshot) -> np.ndarray:
        """Which samples may be hidden, shape ``(N,)``, bool; the ones without a score never are."""

    def weight(self, snapshot: Snapshot) -> float:
        """What each visit of a pass weighs that hides something. Defaults to 1."""
        return 1.0

    def is_active(self, progress: float) -> bool:
        return progress < self.delta - 1e-9

    def settings(self) -> dict[str, Any]:
        return {"policy": self.name, "delta": self.delta, "rescore_every": self.rescore_every}

    def chances(self, snapshot: Snapshot) -> Chances | None:
        seen = snapshot.seen.numpy()
        if not seen.any():
            return None
        turns = (np.arange(len(seen)) + snapshot.pass_index) % self.rescore_every == 0
        hidden = self.learned(snapshot) & seen & ~turns
        return unweighted(1.0 - hidden, seen, self.weight(snapshot))
