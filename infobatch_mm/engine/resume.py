"""Where a run goes on that was trained before, with the hook or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.dist import is_main_process

from ..core import EpochSchedule, IterSchedule, Training
from ..core.state import PrunerState
from ..core.summary import check_summary
from .checkpoints import check_state
from .run import Run


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


def checked(runner: Any, run: Run, state: dict[str, Any] | None) -> dict[str, Any] | None:
    """Refuse a checkpoint, or a work dir, of another run.

    Args:
        runner (Runner): Has loaded the checkpoint.
        run (Run): Which is to go on with it.
        state (dict, optional): The hook's state; None where the checkpoint was written without it.

    Returns:
        dict: The same state, whose ``pruner`` is read.

    Raises:
        ValueError: With both values.
    """
    training = run.training
    if state is not None:
        check_state(state)
        saved = state["pruner"]
        if distinct := run.loader.units.distinct:
            check_units(saved.get("num_samples"), training.schedule.num_samples, distinct)
        state["pruner"] = training.check_state(saved)
        check_repeats(state.get("num_repeats", 1), run.loader.num_repeats)
    if is_main_process():  # to others a file may appear late
        check_summary(runner.work_dir, training.summary())
    return state


def start_without_scores(runner: Any, run: Run) -> None:
    """Take up a run that was not pruned so far.

    Args:
        runner (Runner): Stands where its checkpoint was written.
        run (Run): At its beginning.
    """
    training, schedule = run.training, run.training.schedule
    if isinstance(schedule, EpochSchedule):
        training.start_at(runner.epoch)
        if runner.epoch and not 0 <= runner.iter - schedule.steps_before(runner.epoch) < schedule.pass_steps:
            # Epochs were of other batches; the schedulers come out of the checkpoint with their length.
            pass_steps = runner.iter // runner.epoch
            schedule.take_over({"pass_steps": pass_steps, "total_steps": schedule.num_passes * pass_steps})
    else:
        _find_position(training, runner.iter)
    run.take_up(runner.iter)
    training.full_before = 0
    training.visits_before = training.visits_full - training.visited
    runner.logger.warning(
        f"InfoBatch: the checkpoint was written without InfoBatchHook; scores start empty at pass "
        f"{training.pass_index + 1} of {schedule.num_passes}"
    )


def go_on(runner: Any, run: Run, state: Mapping[str, Any]) -> None:
    """Take up a run of ours.

    Args:
        runner (Runner): Stands where its checkpoint was written.
        run (Run): At its beginning.
        state (Mapping): The hook's state, which was :func:`checked`.

    Raises:
        ValueError: If nothing is left to train.
    """
    parsed = run.training.check_state(state["pruner"])
    goes_on = run.training.load_state_dict(parsed)
    run.take_up(int(state["scheduler_steps"]))
    if not goes_on:
        _draw_again(runner, run, parsed, state["scheduler_steps"])
    run.weigher.mixes = run.weigher.mixes or bool(state.get("mixes", False))
    run.resumed(runner, state)


def _draw_again(runner: Any, run: Run, state: PrunerState, scheduler_steps: int) -> None:
    """Go on in a schedule of other passes than the checkpoint's."""
    training, schedule = run.training, run.training.schedule
    # Iterations are the host's measure there: as many samples as the batch now holds.
    if isinstance(schedule, IterSchedule):
        _find_position(training, run.host_steps(runner))
    before = state.schedule["total_steps"]
    if state.batch_size != schedule.batch_size:
        differs = f"a global batch of {state.batch_size}, this run has {schedule.batch_size}"
    elif state.plan is not None and state.plan.batch_size is not None and before == schedule.total_steps:
        differs = f"a pass in batches of {state.plan.batch_size}, which this run's processes cannot share"
    else:
        differs = f"a schedule of {before} iterations of full data, this run has {schedule.total_steps}"
    if training.finished:
        raise ValueError(
            f"cannot resume: the checkpoint was written with {differs}, and stands at {scheduler_steps} of "
            "them: nothing is left to train; use a longer schedule"
        )
    visits = training.open_pass()
    runner.logger.warning(
        f"InfoBatch: the checkpoint was written with {differs}: the scores are kept; the run goes on in pass "
        f"{training.pass_index + 1} of {schedule.num_passes}, drawn anew, after {training.visited} of its {visits} "
        "visits"
    )


def _find_position(training: Training, steps: int) -> None:
    """Go to where a schedule of iterations stands after so many of them."""
    done, rest = divmod(steps * training.schedule.batch_size, training.schedule.num_samples)
    training.start_at(done, rest, max(1, training.schedule.full_visits(done)))
