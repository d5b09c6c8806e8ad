"""Groups of like losses."""

from __future__ import annotations

import numpy as np

_MOST_ROUNDS = 100


def groups_of(losses: np.ndarray, num_groups: int) -> np.ndarray:
    """The group of each loss by k-means in one dimension, shape ``(n,)``, from 0 for the lowest.

    Lloyd's rounds from the middles of equal shares, until nothing changes. A group that has lost all its losses keeps
    its place, and stays empty.
    """
    ordered = np.sort(losses).astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centres = ordered[((np.arange(num_groups) + 0.5) / num_groups * len(ordered)).astype(np.int64)]
    for _ in range(_MOST_ROUNDS):
        edges = (centres[:-1] + centres[1:]) / 2
        ends = np.concatenate([[0], np.searchsorted(ordered, edges), [len(ordered)]])
        counts = np.diff(ends)
        means = np.where(counts > 0, np.diff(sums[ends]) / np.maximum(counts, 1), centres)
        if (means == centres).all():
            break
        centres = means
    edges = (centres[:-1] + centres[1:]) / 2
    return np.asarray(np.searchsorted(edges, losses.astype(np.float64), side="right"), dtype=np.int64)
