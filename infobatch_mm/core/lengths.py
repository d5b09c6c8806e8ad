"""How many steps a learning-rate scheduler is made for, and whether the training makes as many."""

from __future__ import annotations

import functools
from typing import Any

from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, PolynomialLR, SequentialLR

from .schedule import EpochSchedule

#: What to do with a scheduler that counts epochs, in both kinds of script.
_BY_EPOCH = "leave it to accelerator.prepare(), or in a loop of your own say infobatch.schedule(..., interval='epoch')"


def length_of(scheduler: Any) -> int | None:
    """Steps that a scheduler of torch, diffusers or transformers is made for; None where it does not say.

    Args:
        scheduler (LRScheduler): Not wrapped by accelerate.
    """
    length: Any = None
    if isinstance(scheduler, OneCycleLR):
        length = scheduler.total_steps
    elif isinstance(scheduler, CosineAnnealingLR):
        length = scheduler.T_max
    elif isinstance(scheduler, PolynomialLR):
        length = scheduler.total_iters
    elif isinstance(scheduler, SequentialLR):
        rest = length_of(scheduler._schedulers[-1])
        length = None if rest is None else scheduler._milestones[-1] + rest
    elif isinstance(scheduler, LambdaLR) and scheduler.lr_lambdas:
        length = _told(scheduler.lr_lambdas[0]).get("num_training_steps")
    return length if isinstance(length, int) and length > 0 else None


def _told(function: Any) -> dict[str, Any]:
    """What a function was made with: the arguments of a partial, the variables that a closure holds."""
    if isinstance(function, functools.partial):
        return {**_told(function.func), **function.keywords}
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    told = {}
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=False):
        try:
            told[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return told


def length_line(scheduler: Any, schedule: EpochSchedule, per_update: int, accumulated: int) -> str | None:
    """A warning where a scheduler is made for another number of updates than the training makes; None elsewhere.

    Args:
        scheduler (LRScheduler): Not wrapped by accelerate.
        schedule (EpochSchedule): The training.
        per_update (int): Steps that accelerate makes at each update: one per process, unless batches are split.
        accumulated (int): Batches to an update.
    """
    length = length_of(scheduler)
    if length is None:
        return None
    # Scripts round what a process has of an epoch, its batches or its updates, and some count batches.
    slack = schedule.num_passes * (per_update - 1 + (accumulated > 1))
    batches = schedule.full_batches_before(schedule.num_passes)
    if any(abs(length - updates * per_update) <= slack for updates in (schedule.total_steps, batches)):
        return None
    updates, rest = divmod(length, per_update)
    made_for = f"{updates}" if not rest else f"{length / per_update:.1f}"
    ours = "max_train_steps" if schedule.max_steps else f"{schedule.num_passes} epochs"
    line = (
        f"the {type(scheduler).__name__} is made for {made_for} updates, this training makes {schedule.total_steps} "
        f"({ours})"
    )
    if per_update > 1 and abs(length - schedule.total_steps) <= slack:
        return (
            f"{line}: accelerate steps it {per_update} times at each update, once for each process; multiply its "
            "length by accelerator.num_processes"
        )
    if schedule.max_steps:
        return f"{line}: its rate will not be at its end with the training; give both the same number"
    if length == schedule.num_passes:
        return f"{line}: it seems to count epochs, and is to be stepped by them; {_BY_EPOCH}"
    return (
        f"{line}: if the script stops after {made_for} updates, as by --max_train_steps, give "
        f"max_train_steps={round(length / per_update)} in place of num_epochs; else make the scheduler for "
        f"{schedule.total_steps * per_update}"
    )
