"""The forecast for a whole data set, from the scores of a run and a few hundred gradients."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..core.score_file import read_scores
from ..core.worth import Worth, equal_length, filled_norms, limit, pass_worth
from .calibration import Calibration, calibrate
from .estimates import Estimate, efficiencies, estimate
from .gradients import Measured
from .table import Case, Row, chances_of


@dataclass(frozen=True)
class Whole:
    """What the scores of a run are worth on its whole data set.

    Attributes:
        num_scored (int): Samples that have a score, of N.
        reached (float): Limit of what the scores can reach, ``1 + cv**2`` of the norms that they foretell.
        rows (list[Row]): Policies by the scores as they are, and by the norms that they foretell.
        checks (list[Estimate]): Efficiency of each row by the true gradients of the samples that were measured.
    """

    num_scored: int
    reached: float
    rows: list[Row]
    checks: list[Estimate]

    def plain(self) -> dict[str, Any]:
        """The forecast for JSON."""
        rows = [{**row.plain(), "check": check.plain()} for row, check in zip(self.rows, self.checks, strict=True)]
        return {"num_scored": self.num_scored, "reached": self.reached, "rows": rows}


def scores_of_run(work_dir: str | os.PathLike[str], num_samples: int) -> np.ndarray:
    """The scores that a run has left behind.

    Args:
        work_dir (str | PathLike): Its directory.
        num_samples (int): Size N of the data set that they are to be of.

    Returns:
        ndarray: Shape ``(N,)``, float64; NaN for samples without one.

    Raises:
        ValueError: If there are none, or they are of another data set.
    """
    try:
        scores: np.ndarray = read_scores(work_dir)["score"].astype(np.float64)
    except FileNotFoundError:
        raise ValueError(
            f"--scores {work_dir}: there is no infobatch_scores file; name the directory of a run with InfoBatch"
        ) from None
    if len(scores) != num_samples:
        raise ValueError(
            f"--scores {work_dir} are of {len(scores)} samples, the training data of the config has {num_samples}: "
            "give the scores of a run on the same data"
        )
    return scores


def forecast_whole(
    scores: np.ndarray, measured: Measured, policies: Sequence[Case], noise: float, counts: np.ndarray
) -> Whole:
    """Calibrate scores by true gradients, and look at policies on all samples.

    Args:
        scores (ndarray): Shape ``(N,)``; NaN for samples without one.
        measured (Measured): Of n of them.
        policies (Sequence[Case]): The policies.
        noise (float): Noise scale over batch size.
        counts (ndarray): See :func:`.resampled`, of the n samples.

    Raises:
        ValueError: If too few of the measured samples have a score.
    """
    taken = scores[measured.indices]
    usable = np.isfinite(taken)
    if usable.sum() < 2:
        raise ValueError(
            f"{int(usable.sum())} of the {len(taken)} measured samples have a score: the run has hardly begun; give "
            "scores of a run that has visited its data"
        )
    calibration = calibrate(taken[usable], measured.squares.mean(1)[usable])
    norms = norms_of_all(scores, calibration)
    reached = limit(norms)
    rows, checks = [], []
    for case in policies:
        ways = {"score": scores, "calibrated": norms} if case.policy.needs_scores else {"nothing": scores}
        for way, known in ways.items():
            if (found := chances_of(case.policy, known)) is None:
                continue
            chances, weighted = found
            worth = replace(pass_worth(norms, np.maximum(chances, 1e-9), weighted), limit=reached)
            if worth.efficiency is None:
                continue
            rows.append(_row(case, way, worth, noise))
            drawn = np.repeat(chances[measured.indices][:, None], measured.squares.shape[1], 1)
            checks.append(estimate(efficiencies(measured.squares, drawn, counts)))
    return Whole(int(np.isfinite(scores).sum()), reached, rows, checks)


def norms_of_all(scores: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Norms of all samples; of ones without a score the mean of the others. Shape ``(N,)``, none negative."""
    seen = np.isfinite(scores)
    norms = filled_norms(calibration.norms(np.where(seen, scores, 0.0)), seen, lambda each: each)
    assert norms is not None
    return norms


def _row(case: Case, way: str, worth: Worth, noise: float) -> Row:
    length, efficiency = equal_length(worth, noise), worth.efficiency
    assert efficiency is not None
    alone = (Estimate(each, each, each) for each in (efficiency, length))
    return Row(case.title, way, case.saving, worth, *alone)
