"""Visits of policies that leave samples out without making up for it."""

from __future__ import annotations

import numpy as np
import torch

from ..core.chances import Chances

# Just below 1: such a sample gives way before one that is certain, where visits have to make full batches.
_NEARLY = 1 - 1e-9


def unweighted(chances: np.ndarray, seen: np.ndarray, weight: float = 1.0) -> Chances | None:
    """Chances of visits that all weigh the same, of which samples without a score are the last to be left out.

    Args:
        chances (ndarray): Shape ``(N,)``, float64, in [0, 1].
        seen (ndarray): Which samples have a score, shape ``(N,)``, bool.
        weight (float): Of each visit. Defaults to 1.

    Returns:
        Chances | None: None where all samples are visited for certain.
    """
    if (chances >= 1).all():
        return None
    if not ((chances > 0) & (chances < 1)).any():  # no other sample can give way
        chances = np.where(seen & (chances >= 1), _NEARLY, chances)
    return Chances(torch.from_numpy(chances), weighted=False, weight=weight)
