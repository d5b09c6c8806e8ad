"""What samples without a valid pixel do to losses that are divided by the number of valid ones in their batch.

A blank sample adds nothing to such a loss, but takes a place in its batch, and so decides what the others are divided
by. Blank samples have no score and are never pruned: the batches of a pruned pass hold more of them, and each valid
sample's share of its batch's loss is larger than in a full pass. How much larger is known, because plans are walked in
random order: a batch is a random part of the plan.
"""

from __future__ import annotations

import math
from functools import lru_cache


@lru_cache(maxsize=64)
def blank_factor(num_samples: int, num_blank: int, visits: int, blank_visits: int, batch: int) -> float:
    """What a pruned pass must scale gradients by where losses are divided by the valid samples of their batch.

    With X valid samples in a batch of b, drawn from N samples of which V are valid, a valid one's share of the loss is
    1/X, and ``E[1/X | it is in the batch] = N / (b V) * (1 - C(N-V, b) / C(N, b))``. The factor is the quotient of
    this for the data set and for the plan: with it, the expected gradient of a pruned pass is the full pass's. Exact
    where a sample is either blank or as valid as the others.

    Args:
        num_samples (int): N.
        num_blank (int): N - V.
        visits (int): Visits of the plan.
        blank_visits (int): Visits of blank samples in it.
        batch (int): Samples b in a batch that is divided by one number: one process's.

    Returns:
        float: At most 1 where blank samples are never pruned; 1 where there are none, or nothing else.
    """
    if num_blank == 0 or num_blank == num_samples or blank_visits == visits:
        return 1.0
    return _share(num_samples, num_blank, batch) / _share(visits, blank_visits, batch)


def _share(size: int, blank: int, batch: int) -> float:
    """Expected share of a valid sample in its batch's loss, times the size of the batch."""
    batch = min(batch, size)
    return size / (size - blank) * (1 - _all_blank(size, blank, batch))


def _all_blank(size: int, blank: int, batch: int) -> float:
    """Chance ``C(blank, b) / C(size, b)`` that all of a batch are blank."""
    return math.prod((blank - i) / (size - i) for i in range(batch))
