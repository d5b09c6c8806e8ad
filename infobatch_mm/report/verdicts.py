"""What a comparison may say of its pruned arms: words that follow from intervals, and from nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .seeds import Rows
from .statistics import Interval, confidence, paired_interval

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
        mean (float): Mean of the differences.
        interval (Interval, optional): Interval of the mean; None for one seed, or where a metric was not measured.
        level (float): Its confidence.
        margin (float, optional): What the arm may be worse by than the full run, in units of the metric.
        words (str): The verdict.
    """

    arm: str
    against: str
    other: str
    differences: dict[int, float]
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
            differences = {seed: rows[arm][metric] - rows[other][metric] for seed, rows in seeds.items()}
            interval = paired_interval(list(differences.values()), level)
            if interval is None:
                words = f"no verdict: {'one seed' if len(seeds) == 1 else 'not measured in all seeds'}"
            else:
                gain = interval.negated() if lower_is_better else interval
                words = against_full(gain, margin) if kind == FULL else against_control(gain, kind)
            mean = statistics.fmean(differences.values())
            found.append(Verdict(arm, kind, other, differences, mean, interval, level, margin, words))
    return found


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


def against_control(gain: Interval, kind: str) -> str:
    """The verdict against a control: better or worse where zero lies outside of the interval.

    Args:
        gain (Interval): Of what the pruned arm is better by than the control.
        kind (str): One of :data:`CONTROLS`.
    """
    if gain.low > 0:
        return f"better than {CONTROLS[kind]}"
    return f"worse than {CONTROLS[kind]}" if gain.high < 0 else "undecided"
