"""The average loss over a sample's visits."""

from __future__ import annotations

import numpy as np

from ..core.distributed import Group
from ..core.score_rule import Columns, ScoreRule, register_score
from .raw import RawScore

#: Decay where nothing else is said: about ten visits, as a diffusion loss needs.
DEFAULT_EMA = 0.9

# Averages are taken in blocks of this many records, which are sorted: memory stays small.
_BLOCK = 2**20


@register_score
class EmaScore(ScoreRule):
    """An exponential moving average of losses, with the correction of its beginning (Kingma and Ba, 2015, section 3).

    A sample's loss of k visits ago counts a**k. Where the loss depends on a random mask, crop or timestep, that ranks
    samples better than one draw does.

    Args:
        score_ema (float): Decay a, in (0, 1). Defaults to 0.9, about ten visits.
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.

    Raises:
        ValueError: For a decay of 0.
    """

    name = "ema"
    state_version = 2

    def __init__(self, score_ema: float = DEFAULT_EMA, group: Group = None) -> None:
        super().__init__(group)
        if not score_ema:
            raise ValueError(
                f"score='ema' and score_ema={score_ema!r} contradict each other: 'raw' is the last loss (0), 'ema' an "
                "average over visits (above 0)"
            )
        self.score_ema = float(score_ema)

    def fold(self, columns: Columns, where: np.ndarray, losses: np.ndarray) -> None:
        average(columns, where, losses, self.score_ema)


def average(columns: Columns, where: np.ndarray, losses: np.ndarray, decay: float, squares: bool = False) -> None:
    """Fold losses into the averages of their samples; see :meth:`.ScoreRule.fold`.

    Args:
        columns, where, losses: As there.
        decay (float): Decay of the average, in [0, 1).
        squares (bool): Whether to average squares, and keep the root. Defaults to False.
    """
    if not decay:
        RawScore().fold(columns, where, losses)
        return
    for start in range(0, len(where), _BLOCK):
        _average(columns, where[start : start + _BLOCK], losses[start : start + _BLOCK], decay, squares)


def _average(columns: Columns, where: np.ndarray, new: np.ndarray, decay: float, squares: bool) -> None:
    values, times = columns.values.numpy(), columns.times_seen.numpy()
    columns.seen.numpy()[where] = True
    while len(where):  # once, but for samples that were visited several times
        _, first = np.unique(where, return_index=True)
        at = where[first]
        times[at] += 1
        share = ((1 - decay) / (1 - decay ** times[at])).astype(np.float32)
        if squares:
            values[at] = np.sqrt(values[at] ** 2 + share * (new[first] ** 2 - values[at] ** 2))
        else:
            values[at] += share * (new[first] - values[at])
        where, new = np.delete(where, first), np.delete(new, first)
