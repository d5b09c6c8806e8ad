"""Where a run goes on that was trained before, with the hook or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core import EpochSchedule, IterSchedule, Pruner
from ..core.state import PrunerState
from .param_schedule import SchedulerPacer


def check_repeats(saved: int, num_repeats: int) -> None:
    """Refuse another number of visits in a row.

    Args:
        saved (int): Of the checkpoint.
        num_repeats (int): Of this run.

    Raises:
        ValueError: With both.
    """
    if saved != num_repeats:
        raise ValueError(
            f"cannot resume: the checkpoint was trained with {saved} visits of a sample in a row, this run makes "
            f"{num_repeats} (num_repeats); use the same sampler, or start a new run from its weights with load_from"
        )


def check_units(saved: Any, here: int, distinct: int) -> None:
    """Refuse a checkpoint whose passes are over another number of copies of the same images.

    Args:
        saved: Samples that the checkpoint scores.
        here (int): Samples of this run.
        distinct (int): Images that this run's data set repeats; its length where it repeats none.

    Raises:
        ValueError: With both numbers of copies.
    """
    if isinstance(saved, int) and saved != here and saved % distinct == 0 and (here != distinct or saved > here):
        raise ValueError(
            f"cannot resume: the checkpoint scores {saved // distinct} copies of the {distinct} images of a repeated "
            f"data set, this run {here // distinct}: how many are kept depends on the global batch, so resume with the "
            "checkpoint's; a checkpoint from before repeats were looked through can be trained on from its weights "
            "(load_from)"
        )


def start_without_scores(runner: Any, pruner: Pruner, pacer: SchedulerPacer | None) -> None:
    """Take up a run that was not pruned so far.

    Args:
        runner (Runner): Stands where its checkpoint was written.
        pruner (Pruner): Of this run, at its beginning.
        pacer (SchedulerPacer, optional): None where the host's own loop goes on.
    """
    schedule = pruner.schedule
    if isinstance(schedule, EpochSchedule):
        pruner.start_at(runner.epoch)
        if runner.epoch and not 0 <= runner.iter - schedule.steps_before(runner.epoch) < schedule.pass_steps:
            # Epochs were of other batches; the schedulers come out of the checkpoint with their length.
            pass_steps = runner.iter // runner.epoch
            schedule.take_over({"pass_steps": pass_steps, "total_steps": schedule.num_passes * pass_steps})
    else:
        _find_position(pruner, runner.iter, is_watched=pacer is None)
    if pacer is not None:
        pacer.taken = runner.iter
    pruner.full_before = 0
    pruner.visits_before = pruner.visits_full - pruner.visited
    runner.logger.warning(
        f"InfoBatch: the checkpoint was written without InfoBatchHook; scores start empty at pass "
        f"{pruner.pass_index + 1} of {pruner.schedule.num_passes}"
    )


def go_on(runner: Any, pruner: Pruner, pacer: SchedulerPacer | None, state: Mapping[str, Any]) -> None:
    """Take up a run of ours.

    Args:
        runner (Runner): Stands where its checkpoint was written.
        pruner (Pruner): Of this run, at its beginning.
        pacer (SchedulerPacer, optional): None where the host's own loop goes on.
        state (Mapping): The hook's state, which was checked, and its pruner's read where it was.

    Raises:
        ValueError: If nothing is left to train.
    """
    parsed = pruner.check_state(state["pruner"])
    goes_on = pruner.load_state_dict(parsed)
    if pacer is not None:
        pacer.taken = int(state["scheduler_steps"])
    if not goes_on:
        _draw_anew(runner, pruner, pacer, parsed, state["scheduler_steps"])
    if pacer is None and isinstance(pruner.schedule, EpochSchedule):
        pruner.visited = 0  # the host's own loop starts an epoch anew


def _draw_anew(
    runner: Any, pruner: Pruner, pacer: SchedulerPacer | None, state: PrunerState, scheduler_steps: int
) -> None:
    """Go on in a schedule of other passes than the checkpoint's."""
    schedule, batch_size = pruner.schedule, state.batch_size
    # Iterations are the host's measure there: as many samples as the batch now holds.
    if isinstance(schedule, IterSchedule):
        _find_position(pruner, runner.iter if pacer is None else pacer.taken, is_watched=pacer is None)
    if batch_size != schedule.batch_size:
        differs = f"a global batch of {batch_size}, this run has {schedule.batch_size}"
    else:
        before = state.schedule["total_steps"]
        differs = f"a schedule of {before} iterations of full data, this run has {schedule.total_steps}"
    if pruner.finished:
        raise ValueError(
            f"cannot resume: the checkpoint was written with {differs}, and stands at {scheduler_steps} of "
            "them: nothing is left to train; use a longer schedule"
        )
    visits = schedule.full_visits(pruner.pass_index) if pacer is None else len(pruner.begin_pass())
    runner.logger.warning(
        f"InfoBatch: the checkpoint was written with {differs}: the scores are kept; the run goes on in pass "
        f"{pruner.pass_index + 1} of {schedule.num_passes}, drawn anew, after {pruner.visited} of its {visits} visits"
    )


def _find_position(pruner: Pruner, steps: int, is_watched: bool) -> None:
    """Go to where a schedule of iterations stands after so many of them."""
    done, rest = divmod(steps * pruner.schedule.batch_size, pruner.schedule.num_samples)
    if is_watched:  # the host's own sampler has no plan
        pruner.start_at(done)
        pruner.visited = min(rest, pruner.schedule.full_visits(done))
    else:
        pruner.start_at(done, rest, max(1, pruner.schedule.full_visits(done)))
