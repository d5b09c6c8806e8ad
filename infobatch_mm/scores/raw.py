"""The last loss of a sample, as in the paper."""

from __future__ import annotations

import numpy as np

from ..core.distributed import Group
from ..core.score_rule import Columns, ScoreRule, register_score


@register_score
class RawScore(ScoreRule):
    """The last loss (InfoBatch, section 3.2).

    Args:
        score_ema (float): Only 0, which is no average. Defaults to 0.
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.

    Raises:
        ValueError: For another ``score_ema``.
    """

    name = "raw"
    overwrites = True

    def __init__(self, score_ema: float = 0.0, group: Group = None) -> None:
        super().__init__(group)
        if score_ema:
            raise ValueError(
                f"score='raw' and score_ema={score_ema!r} contradict each other: 'raw' is the last loss (0), 'ema' an "
                "average over visits (above 0)"
            )

    def fold(self, columns: Columns, where: np.ndarray, losses: np.ndarray) -> None:
        # numpy's assignment keeps the last of repeated indices; torch does not promise which.
        columns.values.numpy()[where] = losses
        columns.seen.numpy()[where] = True
        np.add.at(columns.times_seen.numpy(), where, 1)
