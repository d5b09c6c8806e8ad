"""What a comparison may say of its pruned arms: words that follow from intervals, and from nothing else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .seeds import Rows, are_finite
from .statistics import Interval, confidence, paired_interval

# Visits that are no further apart than this share are as many.
_ALIKE = 0.01
#: The opponent that every pruned arm has: the unpruned run.
FULL = "full"
#: Kinds of controls, and what a pruned arm is better than where it is better than one.
CONTROLS = {
    "shortened": "shorter",
    "random": "random",
    "smaller": "smaller batches",
    "unweighted": "unweighted",
}


@dataclass(frozen=True)
class Verdict:
    """One pruned arm against one opponent, over all seeds.

    Attributes:
        arm (str): The pruned arm.
        against (str): Kind of the opponent: :data:`FULL` or one of :data:`CONTROLS`.
        other (str): The opponent's own name among the arms.
        differences (dict[int, float]): Metric of the arm minus the opponent's, by seed.
        visits (dict[int, tuple[float, float]]): Sample visits of the arm and of the opponent, by seed; 1 where rows
            have none.
        mean (float): Mean of the differences; NaN where one was not measured.
        interval (Interval, optional): Interval of the mean; None for one seed, or where a metric was not measured.
        level (float): Its confidence.
        margin (float, optional): What the arm may be worse by than the full run, in units of the metric.
        words (str): The verdict.
    """

    arm: str
    against: str
    other: str
    differences: dict[int, float]
    visits: dict[int, tuple[float, float]]
    mean: float
    interval: Interval | None
    level: float
    margin: float | None
    words: str

    def as_json(self) -> dict[str, Any]:
        """The same as plain numbers; the interval as its two ends."""
        ends = None if self.interval is None else [self.interval.low, self.interval.high]
        return {**asdict(self), "interval": ends}


def verdicts(
    metric: str,
    seeds: Mapping[int, Rows],
    opponents: Mapping[str, Mapping[str, str]],
    margin: float | None,
    lower_is_better: bool,
) -> list[Verdict]:
    """Compare each pruned arm with each of its opponents.

    Args:
        metric (str): Name of the metric in the rows.
        seeds (Mapping[int, Rows]): The rows of each seed.
        opponents (Mapping[str, Mapping[str, str]]): For each pruned arm, the name of the arm that it is compared with,
            by its kind: :data:`FULL` or one of :data:`CONTROLS`.
        margin (float, optional): At least 0; None gives no verdict against the full run.
        lower_is_better (bool): Whether the metric is a loss.

    Returns:
        list[Verdict]: Arm by arm. The intervals of all arms against the same kind of opponent hold at once.
    """
    level = confidence(len(opponents))
    found = []
    for arm, others in opponents.items():
        for kind, other in others.items():
            values = {seed: (rows[arm][metric], rows[other][metric]) for seed, rows in seeds.items()}
            visits = {seed: _visits(rows, arm, other) for seed, rows in seeds.items()}
            differences = {seed: own - its for seed, (own, its) in values.items()}
            measured = are_finite(differences.values())
            scale = max((abs(value) for pair in values.values() for value in pair), default=0.0)
            interval = paired_interval(list(differences.values()), level, scale)
            if not measured:
                words = "no verdict: not measured in all seeds"
            elif interval is None:
                words = "no verdict: one seed"
            elif interval.has_width:
                gain = interval.negated() if lower_is_better else interval
                words = against_full(gain, margin) if kind == FULL else against_control(gain, kind, visits)
            else:
                alike = all(own == its for own, its in [*values.values(), *visits.values()])
                words = without_spread(alike and kind == FULL, margin)
            mean = statistics.fmean(differences.values()) if measured else math.nan
            found.append(Verdict(arm, kind, other, differences, visits, mean, interval, level, margin, words))
    return found


def _visits(rows: Rows, arm: str, other: str) -> tuple[float, float]:
    """Visits of an arm and of its opponent."""
    own, its = (rows[name].get("visits", 1.0) for name in (arm, other))
    return own, its


def without_spread(same: bool, margin: float | None) -> str:
    """The verdict where the differences of all seeds are equal, which an interval takes for certainty.

    Args:
        same (bool): Whether the arm is the full run itself, by its visits and its metric in all seeds.
        margin (float, optional): What it may be worse by than the full run.
    """
    return "lossless" if same and margin is not None else "undecided: all differences are equal"


def against_full(gain: Interval, margin: float | None) -> str:
    """The verdict of non-inferiority.

    Args:
        gain (Interval): Of what the pruned arm is better by than the full run.
        margin (float, optional): What it may be worse by, at least 0.

    Returns:
        str: ``'lossless'`` where the interval's worse end is better than the negative margin, ``'inferior'`` where
        the better end is worse than it, else ``'undecided'``; ``'no margin stated'`` where there is none.
    """
    if margin is None:
        return "no margin stated"
    if gain.low > -margin:
        return "lossless"
    return "inferior" if gain.high < -margin else "undecided"


def against_control(gain: Interval, kind: str, visits: Mapping[int, tuple[float, float]] | None = None) -> str:
    """The verdict against a control: better or worse where zero lies outside of the interval.

    A control is fair where its visits are no more than 1 % off the arm's. One with more visits is the harder opponent:
    an arm may still be better, and not worse. One with fewer is the easier: an arm may still be worse.

    Args:
        gain (Interval): Of what the pruned arm is better by than the control.
        kind (str): One of :data:`CONTROLS`.
        visits (Mapping[int, tuple[float, float]], optional): Visits of the arm and of the control, by seed. Defaults to
            None: as many.
    """
    shares = {seed: its / own if own else math.inf for seed, (own, its) in (visits or {}).items()}
    fewest, most = min(shares, key=shares.__getitem__, default=None), max(shares, key=shares.__getitem__, default=None)
    is_worse = gain.high < 0
    if most is not None and is_worse and shares[most] > 1 + _ALIKE:
        return f"no verdict: the control made {shares[most] - 1:.1%} more visits in seed {most}"
    if fewest is not None and not is_worse and shares[fewest] < 1 - _ALIKE:
        return f"no verdict: the control made {1 - shares[fewest]:.1%} fewer visits in seed {fewest}"
    if is_worse:
        return f"worse than {CONTROLS[kind]}"
    return f"better than {CONTROLS[kind]}" if gain.low > 0 else "undecided"
