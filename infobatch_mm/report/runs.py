"""A finished run of MMEngine in numbers: its quality over its visits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ..core import Schedule
from .logs import last_value, validations
from .summaries import read_summary


@dataclass
class Arm:
    """What one run gave.

    Attributes:
        visits (list[int]): Sample visits up to each validation.
        quality (list[float]): The metric at each validation.
        iterations (int): Iterations of the whole run.
        wall_time_s (float): Wall-clock of the process.
        kept (list[float]): Share of the samples kept in each pass; empty where nothing is pruned.
    """

    visits: list[int]
    quality: list[float]
    iterations: int
    wall_time_s: float
    kept: list[float]

    def row(self, metric: str) -> dict[str, float]:
        """The run in four numbers."""
        return {
            metric: self.quality[-1],
            "visits": self.visits[-1],
            "iterations": self.iterations,
            "wall_time_s": round(self.wall_time_s, 1),
        }


def read_arm(
    work_dir: Path,
    metric: str,
    schedule: Schedule,
    wall_time_s: float,
    fine_tuned: Path | None = None,
    length: int = 0,
) -> Arm:
    """What a run left behind.

    Args:
        work_dir (Path): Where it did.
        metric (str): Name of the metric in its log.
        schedule (Schedule): Passes of the unpruned run, whole or shortened.
        wall_time_s (float): Its wall-clock.
        fine_tuned (Path, optional): Where a run that started from its last checkpoint left its log, which then
            has the metric; visits and wall-clock stay those of the run itself.
        length (int): The epochs or iterations that the run's config says, for a run whose own log has no metric.

    Returns:
        Arm: Visits are counted as they were made: a pruned run's from its summary. Its metric is NaN where it was
        never measured.
    """
    summary = read_summary(work_dir)
    if summary is not None and schedule.loop == "iterations":
        length = summary["iterations"]
    if fine_tuned is None:
        points = [(line["step"], line[metric]) for line in validations(work_dir) if metric in line]
        points = points or [(length, math.nan)]
    else:
        points = [(length, last_value(fine_tuned, metric))]
    steps, quality = [step for step, _ in points], [value for _, value in points]
    kept = [] if summary is None else summary["per_pass"]
    if schedule.loop == "iterations" and summary is not None and summary.get("keep") == "steps":
        visits, iterations = _visits_of_smaller_batches(schedule, kept, steps), steps[-1]
    elif schedule.loop == "iterations":  # every batch of an iteration loop is full
        visits, iterations = [step * schedule.batch_size for step in steps], steps[-1]
    elif summary is None:
        visits, iterations = [step * schedule.full_visits(0) for step in steps], steps[-1] * schedule.full_batches(0)
    else:
        visits = [sum(entry["kept"] for entry in kept[:step]) for step in steps]
        iterations = summary["iterations"]
    return Arm(visits, quality, iterations, wall_time_s, [entry["kept_ratio"] for entry in kept])


def _visits_of_smaller_batches(
    schedule: Schedule, per_pass: Sequence[Mapping[str, Any]], steps: Sequence[int]
) -> list[int]:
    """Visits up to each step of a run whose pruned passes make as many steps as full ones, on smaller batches."""
    ends = accumulate(schedule.full_batches(entry["pass"]) for entry in per_pass)
    visits = accumulate(entry["kept"] for entry in per_pass)
    return [round(float(each)) for each in np.interp(steps, [0, *ends], [0, *visits])]


def last_checkpoint(work_dir: Path) -> str:
    """The last checkpoint that a run wrote.

    Raises:
        SystemExit: If there is none.
    """
    note = work_dir / "last_checkpoint"
    if not note.is_file():
        raise SystemExit(f"the run in {work_dir} wrote no checkpoint to go on from: give it a CheckpointHook")
    return note.read_text().strip()
