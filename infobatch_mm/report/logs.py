"""The log of a run of MMEngine: its validations, and the metric to compare runs by."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

#: What runs are compared by where the user does not say: the first that the log has. The hosts log percents.
METRICS = ("mIoU", "accuracy/top1")
# Percent points that a pruned run may be worse by, where the user does not say.
_MARGIN = 0.5


def find_metric(work_dir: Path, wanted: str | None) -> str:
    """The metric to compare by: the one asked for, else the first of :data:`METRICS` that the log has.

    Args:
        work_dir (Path): Of the run.
        wanted (str, optional): Name in the log.

    Returns:
        str: Name in the log.

    Raises:
        SystemExit: If the log has none, with the names it has.
    """
    logged = {key for line in validations(work_dir) for key in line} - {"step", "time", "data_time"}
    for metric in METRICS if wanted is None else [wanted]:
        if metric in logged:
            return metric
    raise SystemExit(
        f"the log has no {wanted or ' and no '.join(METRICS)}: choose with --metric one of "
        f"{', '.join(sorted(logged)) or 'none, nothing was validated'}"
    )


def last_value(work_dir: Path, metric: str) -> float:
    """The metric at the last validation of a run; NaN where there is none."""
    return next((line[metric] for line in reversed(validations(work_dir)) if metric in line), math.nan)


def validations(work_dir: Path) -> list[dict[str, Any]]:
    """The validations of a run in their order, over all its lives: where it was resumed, the later life counts.

    Args:
        work_dir (Path): Of the run.

    Returns:
        list[dict]: Value of each metric, and under ``step`` the epochs or iterations before the validation.
    """
    found: list[dict[str, Any]] = []
    # Each life logs into a folder named by its time.
    for scalars in sorted(work_dir.glob("*/vis_data/scalars.json")):
        life = _validations_in(scalars)
        if life:  # what came after the checkpoint that it began from was made a second time
            found = [line for line in found if line["step"] < life[0]["step"]] + life
    return found


def _validations_in(scalars: Path) -> list[dict[str, Any]]:
    """The validations in one log."""
    lines = []
    for text in scalars.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # a kill has cut the line short
            continue
    # Lines of the training name their iteration, and ours their prefix.
    return [line for line in lines if "iter" not in line and not any(key.startswith("infobatch/") for key in line)]


def set_aside(work_dir: Path) -> None:
    """Rename the logs that a work dir holds, which then count no more: a training there begins from the start."""
    for scalars in work_dir.glob("*/vis_data/scalars.json"):
        scalars.rename(scalars.with_name("scalars.superseded.json"))


def default_margin(metric: str) -> float | None:
    """What a pruned run may be worse by and still be called lossless; None for metrics of unknown units."""
    return _MARGIN if metric in METRICS else None


def is_loss(metric: str) -> bool:
    """Whether lower values of a metric are better, by a word of its name: ``decode.loss_ce``, not ``lossless``."""
    words = re.findall(r"[A-Z]*[a-z]+|[A-Z]+", metric)
    return any(word.lower() in ("loss", "losses") for word in words)


def labelled(metric: str) -> str:
    """A metric as tables and figures name it, with its unit where that is known."""
    return f"{metric} (%)" if metric in METRICS else metric
