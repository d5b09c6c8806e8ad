"""Less data in each pass, and all of it in the last one."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.chances import Chances
from ..core.checks import whole_number
from ..core.policy import Snapshot
from ..core.policy_registry import register_policy
from .arguments import checked_share
from .hiding import HidingPolicy
from .kakurenbo import is_confident
from .unweighted import unweighted


@register_policy
class ProgressiveDropoutPolicy(HidingPolicy):
    """Drops what the model knows, or ever more at random, and revises all of it in the last passes.

    Progressive Data Dropout (Sathiyanarayanan et al., NeurIPS 2025). ``mode='dbpd'``, by difficulty: a sample is left
    out while the probability of its true class, ``exp(-loss)`` of a cross-entropy, is at least tau. ``mode='srd'``,
    scalar random dropout: pass t, counted from 0, visits a random share ``decay**t``. In both the last ``revision``
    passes visit everything. No weights: not unbiased. Difference in ``'dbpd'``: the paper runs every sample forward in
    each pass; here a sample that is left out is scored by a visit, see :class:`.HidingPolicy`.

    Args:
        mode (str): ``'dbpd'`` or ``'srd'``. Defaults to ``'dbpd'``.
        tau (float): Of ``'dbpd'``, in (0, 1). Defaults to 0.3.
        decay (float): Of ``'srd'``, in (0, 1). Defaults to 0.95.
        revision (int): Passes at the end that visit everything, at least 0. Defaults to 1.
        rescore_every (int): Of ``'dbpd'``, as :class:`.HidingPolicy` takes it. Defaults to 2.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "progressive_dropout"

    def __init__(
        self, mode: str = "dbpd", tau: float = 0.3, decay: float = 0.95, revision: int = 1, rescore_every: int = 2
    ) -> None:
        super().__init__(rescore_every=rescore_every)
        if mode not in ("dbpd", "srd"):
            raise ValueError(f"mode={mode!r}: use 'dbpd', dropout by difficulty, or 'srd', scalar random dropout")
        self.mode = mode
        self.tau = checked_share("tau", tau, "the probability of the true class from which on a sample is dropped")
        self.decay = checked_share("decay", decay, "what the share of visited samples is multiplied by in each pass")
        meaning = "it is the number of passes at the end that visit everything; use 1"
        self.revision = whole_number("revision", revision, 0, meaning)

    @property
    def needs_scores(self) -> bool:  # type: ignore[override]
        return self.mode == "dbpd"

    def settings(self) -> dict[str, Any]:
        used = {"tau": self.tau, "rescore_every": self.rescore_every} if self.mode == "dbpd" else {"decay": self.decay}
        return {"policy": self.name, "mode": self.mode, **used, "revision": self.revision}

    def chances(self, snapshot: Snapshot) -> Chances | None:
        passes_left = (1 - snapshot.progress) / snapshot.pass_share
        if passes_left <= self.revision + 1e-6:
            return None
        if self.mode == "dbpd":
            return super().chances(snapshot)
        seen = snapshot.seen.numpy()
        return unweighted(np.full(len(seen), self.decay**snapshot.pass_index), seen)

    def learned(self, snapshot: Snapshot) -> np.ndarray:
        return is_confident(snapshot.scores.numpy(), self.tau)
