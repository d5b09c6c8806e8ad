"""Runs of so few passes that nothing is pruned, or that none visits every sample at the end."""

from __future__ import annotations

import math

from .training import Training


def short_run_line(training: Training) -> str | None:
    """What to warn of before a run begins; None where there is nothing to say.

    Args:
        training (Training): Of a run that is about to begin.

    Returns:
        str | None: What will happen, and a setting that changes it; never one that is refused, or that makes the run
        prune nothing.
    """
    schedule, policy = training.schedule, training.policy
    delta, last = policy.settings().get("delta", 1), schedule.num_passes - 1
    later = (schedule.progress(pass_index) for pass_index in range(1, schedule.num_passes))
    if policy.needs_scores and policy.is_active(0) and not any(map(policy.is_active, later)):
        passes = schedule.total_samples / schedule.num_samples
        length = "1 pass" if passes == 1 else f"{passes:.3g} passes"
        return (
            f"InfoBatch: this training prunes nothing: it is {length} over {schedule.num_samples} samples, "
            f"scores come only from the first, and pruning ends after delta={delta} of it; "
            f"{_longer(training, max(2, math.floor(1 / delta) + 1))}, or train without InfoBatch"
        )
    if delta == 1 or not policy.is_active(schedule.progress(last)):
        return None
    found = (
        f"InfoBatch: no pass starts after delta={delta} of {schedule.num_passes} passes, so none visits every sample "
        "at the end"
    )
    if last < 2:
        return f"{found}; {_longer(training, 3)} and a smaller delta for one that does"
    return f"{found}; use delta={math.floor(100 * schedule.progress(last)) / 100} for one that does"


def _longer(training: Training, passes: int) -> str:
    """How to make a training have so many passes."""
    schedule = training.schedule
    if schedule.loop == "epochs":
        return f"use {passes} epochs or more (now {schedule.num_passes})"
    iterations = math.ceil(passes * schedule.num_samples / schedule.batch_size)
    return f"use {iterations} iterations or more (now {schedule.total_steps})"
