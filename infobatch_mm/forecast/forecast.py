"""The forecast of one training: measured, estimated, looked up in a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core import PruningPolicy
from .estimates import Estimate, estimate, limits, noise_scales, resampled, share_between
from .gradients import Measured, Subject, choose, measure
from .table import Row, cases, length, table
from .whole import Whole, forecast_whole

_LITTLE = 1e-6


@dataclass(frozen=True)
class Forecast:
    """What pruning is worth on a training.

    Attributes:
        num_samples (int): Size N of the data set.
        measured (Measured): What was measured.
        batch_size (int): Samples in an optimiser step of all processes.
        limit (Estimate): Largest efficiency of any unbiased pruning.
        noise_scale (Estimate): In samples; infinite where the mean gradient is not seen.
        most (Estimate): What a visit can be worth at most in visits of a shorter training, at this noise; at least 1.
        between (float): Share of the variance of squared norms that is between samples, in [0, 1].
        rows (list[Row]): The table.
        whole (Whole, optional): What the scores of a run are worth on all samples.
        remarks (list[str]): How the training was looked at.
    """

    num_samples: int
    measured: Measured
    batch_size: int
    limit: Estimate
    noise_scale: Estimate
    most: Estimate
    between: float
    rows: list[Row]
    whole: Whole | None
    remarks: list[str]

    @property
    def noise(self) -> float:
        """Noise scale over batch size: noise limits where it is large."""
        return self.noise_scale.value / self.batch_size

    def plain(self) -> dict[str, Any]:
        """All of it for JSON."""
        return {
            "num_samples": self.num_samples,
            "measured": len(self.measured),
            "left_out": self.measured.left_out,
            "batch_size": self.batch_size,
            "limit": self.limit.plain(),
            "noise_scale": self.noise_scale.plain(),
            "noise_over_batch": self.noise if math.isfinite(self.noise) else None,
            "most": self.most.plain(),
            "variance_between_samples": self.between,
            "rows": [row.plain() for row in self.rows],
            "whole": None if self.whole is None else self.whole.plain(),
            "remarks": self.remarks,
        }


def forecast(
    subject: Subject,
    samples: int = 256,
    savings: Sequence[float] = (0.3, 0.5),
    seed: int = 0,
    scores: np.ndarray | None = None,
    own: PruningPolicy | None = None,
    done: Callable[[], None] | None = None,
) -> Forecast:
    """Measure single samples, and say what pruning is worth.

    Args:
        subject (Subject): The training.
        samples (int): How many to measure, at most N. Defaults to 256.
        savings (Sequence[float]): Shares of a pass's visits to save, each in (0, 0.9]. Defaults to 0.3 and 0.5.
        seed (int): Of the samples and their visits, at least 0. Defaults to 0.
        scores (ndarray, optional): Of all samples, shape ``(N,)``, NaN where there is none; see
            :func:`.scores_of_run`.
        own (PruningPolicy, optional): The policy that the training names.
        done (Callable, optional): Called after each sample.

    Raises:
        ValueError: If a number is out of its range, or gradients are not finite.
    """
    policies = cases(savings, own)
    chosen = choose(subject.num_samples, samples, seed)
    measured = measure(subject, chosen, seed, done)
    counts = resampled(len(measured), seed)
    limit, noise_scale = limits(measured, counts), noise_scales(measured, counts)
    noises = noise_scale / subject.batch_size
    # Of a pass so small that its worth never reaches a full one's.
    most = np.array([length(_LITTLE, *each) for each in zip(limit, noises, strict=True)]) / _LITTLE
    return Forecast(
        subject.num_samples,
        measured,
        subject.batch_size,
        estimate(limit),
        estimate(noise_scale),
        estimate(most),
        share_between(measured),
        table(measured, policies, float(limit[0]), noises, counts),
        None if scores is None else forecast_whole(scores, measured, policies, float(noises[0]), counts),
        subject.remarks,
    )
