"""What the runs of a comparison left behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infobatch_mm.core import Schedule
from infobatch_mm.policies import InfoBatchPolicy

#: What runs are compared by where the user does not say: the first that the log has. The hosts log percents.
METRICS = ("mIoU", "accuracy/top1")
#: What visits were called in summaries of earlier versions.
_NAMES_BEFORE = {"visits": "samples_seen", "visits_full": "samples_full"}


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


def find_metric(work_dir: Path, wanted: str | None) -> str:
    """The metric to compare by: the one asked for, else the first of :data:`METRICS` that the log has.

    Raises:
        SystemExit: If the log has none, with those it has.
    """
    logged = {key for line in _validations(work_dir) for key in line} - {"step", "time", "data_time"}
    for metric in METRICS if wanted is None else [wanted]:
        if metric in logged:
            return metric
    raise SystemExit(
        f"the log has no {wanted or ' and no '.join(METRICS)}: choose with --metric one of "
        f"{', '.join(sorted(logged)) or 'none, nothing was validated'}"
    )


def read_summary(work_dir: Path) -> dict[str, Any] | None:
    """``infobatch_summary.json`` of a run, None where it was not pruned."""
    path = work_dir / "infobatch_summary.json"
    if not path.is_file():
        return None
    summary = json.loads(path.read_text())
    for name, before in _NAMES_BEFORE.items():
        if before in summary:
            summary.setdefault(name, summary.pop(before))
    return summary


def random_ratio(schedule: Schedule, summary: dict[str, Any]) -> float:
    """The share that prunes at random, in all passes before ``delta`` alike, as many visits as a pruned run saved.

    Args:
        schedule (Schedule): The unpruned run.
        summary (dict): ``infobatch_summary.json`` of the pruned one.
    """
    policy = InfoBatchPolicy(summary["prune_ratio"], summary["delta"])
    passes = [p for p in range(schedule.num_passes) if policy.is_active(schedule.progress(p))]
    prunable = sum(schedule.full_visits(p) for p in passes)
    return (summary["visits_full"] - summary["visits"]) / prunable if prunable else 0.0


def last_checkpoint(work_dir: Path) -> str:
    """The last checkpoint that a run wrote.

    Raises:
        SystemExit: If there is none.
    """
    note = work_dir / "last_checkpoint"
    if not note.is_file():
        raise SystemExit(f"the run in {work_dir} wrote no checkpoint to go on from: give it a CheckpointHook")
    return note.read_text().strip()


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
        schedule (Schedule): :func:`schedule_of` the unpruned run, whole or shortened.
        wall_time_s (float): Its wall-clock.
        fine_tuned (Path, optional): Where a run that started from its last checkpoint left its log, which then
            has the metric; visits and wall-clock stay those of the run itself.
        length (int): In that case, the epochs or iterations that the run's config says.

    Returns:
        Arm: Visits are counted as they were made: a pruned run's from its summary.
    """
    summary = read_summary(work_dir)
    if fine_tuned is None:
        points = [(line["step"], line[metric]) for line in _validations(work_dir) if metric in line]
    else:
        if summary is not None and schedule.loop == "iterations":
            length = summary["iterations"]
        points = [(length, last_value(fine_tuned, metric))]
    steps, quality = [step for step, _ in points], [value for _, value in points]
    kept = [] if summary is None else summary["per_pass"]
    if schedule.loop == "iterations":  # every batch of an iteration loop is full
        visits, iterations = [step * schedule.batch_size for step in steps], steps[-1]
    elif summary is None:
        visits, iterations = [step * schedule.full_visits(0) for step in steps], steps[-1] * schedule.full_batches(0)
    else:
        visits = [sum(entry["kept"] for entry in kept[:step]) for step in steps]
        iterations = summary["iterations"]
    return Arm(visits, quality, iterations, wall_time_s, [entry["kept_ratio"] for entry in kept])


def last_value(work_dir: Path, metric: str) -> float:
    """The metric at the last validation of a run."""
    return [line[metric] for line in _validations(work_dir) if metric in line][-1]


def _validations(work_dir: Path) -> list[dict[str, Any]]:
    # each run logs into a folder named by its time
    scalars = sorted(work_dir.glob("*/vis_data/scalars.json"))[-1]
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    # those of training name their iteration, ours their prefix
    return [line for line in lines if "iter" not in line and not any(key.startswith("infobatch/") for key in line)]
