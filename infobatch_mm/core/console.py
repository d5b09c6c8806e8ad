"""What a run says on the console: one line for each pass and one at the end."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .training import Training

logger = logging.getLogger("infobatch_mm")


def say(line: str, level: int = logging.INFO) -> None:
    """Log a line, at level INFO unless told otherwise; print it to stderr where a script has not set logging up.

    ``logging.getLogger("infobatch_mm").setLevel("WARNING")`` silences it in both cases.
    """
    if logger.hasHandlers():
        logger.log(level, line)
    elif logger.level <= level:
        print(line, file=sys.stderr)


def pass_line(training: Training) -> str:
    """What the last finished pass visited, what is saved so far, and what gave no scores."""
    entry = training.history[-1]
    line = (
        f"InfoBatch pass {entry['pass'] + 1} of {training.schedule.num_passes} done: kept {entry['kept_ratio']:.1%}, "
        f"saved so far {training.saved_ratio:.1%}"
    )
    return "; ".join([line + _worth(entry), *_unusable(entry, training)])


def _worth(entry: dict[str, Any]) -> str:
    """What the pass was worth by the scores it was planned with; '' where they did not tell."""
    if entry.get("limit") is None:
        return ""
    if entry["worth"] is None or entry["cost"] == 1:
        return f", limit {entry['limit']:.2f}"
    efficiency = f"efficiency {entry['efficiency']:.2f}, limit {entry['limit']:.2f}"
    return f", worth {entry['worth']:.1%} of a full pass ({efficiency})"


class Remarks:
    """What a policy has to say before a pass: each decision once, until it is another."""

    def __init__(self) -> None:
        self._said: str | None = None

    def line(self, training: Training) -> str | None:
        """What is to be said before the next pass; None for nothing new.

        Args:
            training (Training): Has booked a pass.
        """
        if training.finished or not training.is_active or (remark := training.policy.remark(training.limit)) is None:
            return None
        decision, why = remark
        if decision == self._said:
            return None
        self._said = decision
        return f"InfoBatch: {decision}: {why}"


def _unusable(entry: dict[str, Any], training: Training) -> list[str]:
    store, found = training.store, []
    if entry["skipped"]:
        found.append(f"{_count(entry['skipped'], 'visit')} skipped")
    if store.num_nonfinite:
        found.append(f"{_count(store.num_nonfinite, 'visit')} so far with a NaN or infinite loss")
    if store.num_invalid:
        found.append(f"{_count(store.num_invalid, 'visit')} so far without a valid pixel or of a replaced sample")
    if training.store.num_unscored:
        found.append(f"{_count(training.store.num_unscored, 'sample')} without a score")
    return found


def end_line(training: Training, wall_time_s: float | None = None) -> str:
    """What the whole run visited, and what it saved."""
    time = "" if wall_time_s is None else f", {wall_time_s:,.0f} s"
    skipped = f" and {training.visits_skipped:,} skipped" if training.visits_skipped else ""
    return (
        f"InfoBatch: {_count(training.visits, 'visit')}{skipped} in place of {training.visits_full:,}, "
        f"{training.saved_ratio:.1%} saved, in {_count(training.pass_index, 'pass', 'passes')}{time}"
        + _short_of_target(training)
    )


def _short_of_target(training: Training) -> str:
    """What is said where the policy could not save as much as it was to; '' elsewhere."""
    target = training.policy.settings().get("target_saving")
    if not training.finished or target is None or training.saved_ratio >= target - 0.01:
        return ""
    return f"; less than target_saving={target}: {training.policy.why_less}"


def unscored_line(training: Training) -> str | None:
    """A warning where at least a tenth of the samples gave no score and so are never pruned; None elsewhere."""
    without, num_samples = training.store.num_unscored, training.schedule.num_samples
    if 10 * without < num_samples:
        return None
    return (
        f"InfoBatch: {without} of {num_samples} samples have no score and are never pruned: they were visited, but had "
        "no valid pixel, were replaced by another, or their loss was not finite; take them out of the data set to save "
        "their visits"
    )


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
