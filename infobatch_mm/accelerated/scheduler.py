"""Learning-rate schedules that follow the progress through passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau


class PassScheduler:
    """A prepared scheduler whose steps are those that the unpruned run would have taken at the same progress.

    It takes the place of accelerate's: ``step()`` is called where it was, after each optimiser step, and moves the
    scheduler on by as many steps as are due, sometimes none. Everything else is the wrapped one's.

    Args:
        prepared (AcceleratedScheduler): What ``accelerator.prepare`` made of the scheduler.
        steps_due (Callable[[], int]): Steps that the scheduler is to have taken by now, since the training began.
        updates_done (Callable[[], int]): Optimiser steps made by now.
        pass_updates (int): Optimiser steps of an unpruned pass.

    Attributes:
        prepared (AcceleratedScheduler): As above.

    Raises:
        ValueError: If the scheduler does not say how many steps it has taken, or is not stepped by accelerate's rule.
    """

    def __init__(
        self,
        prepared: AcceleratedScheduler,
        steps_due: Callable[[], int],
        updates_done: Callable[[], int],
        pass_updates: int,
    ) -> None:
        self.prepared = prepared
        self._steps_due = steps_due
        self._updates_done = updates_done
        self._pass_updates = pass_updates
        self._stepped_at: int | None = 0
        self._late = 0
        if not hasattr(prepared.scheduler, "last_epoch"):
            raise ValueError(
                f"a {type(prepared.scheduler).__name__} does not say how many steps it has taken, and cannot follow "
                "the progress: give infobatch.prepare() a SequentialLR or a LambdaLR in its place"
            )
        if not prepared.step_with_optimizer:
            raise ValueError(
                "step_scheduler_with_optimizer=False: when its steps are due is the script's affair, and they cannot "
                "follow the progress; leave it out of Accelerator()"
            )
        self._begin = prepared.scheduler.last_epoch  # 0, unless the scheduler was handed over in its midst

    @property
    def follows_its_arguments(self) -> bool:
        """Whether this run says its length, and not a checkpoint.

        A ``LambdaLR``, as all of diffusers' schedulers are, keeps its function out of checkpoints.
        """
        return isinstance(self.prepared.scheduler, LambdaLR)

    def forget(self) -> None:
        """Forget when it was stepped last; a loaded state may be from elsewhere in the training."""
        self._stepped_at = None

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Move on to where the progress stands.

        Raises:
            ValueError: If it is not called after every optimiser step.
        """
        if not self.prepared.gradient_state.sync_gradients:
            self.prepared.step(*args, **kwargs)  # which only counts here
            return
        self._check_rhythm(self._updates_done())
        if any(optimizer.step_was_skipped for optimizer in self.prepared.optimizers):
            return  # gradients overflowed; the step is made up for after the next
        scheduler = self.prepared.scheduler
        missing = self._begin + self._steps_due() - scheduler.last_epoch
        if missing < 0 and self.follows_its_arguments:  # resumed with larger batches, hence fewer steps
            scheduler.last_epoch += missing - 1
            missing = 1
        for _ in range(missing):
            # A schedule that ends for good, as OneCycleLR's, is not asked beyond its end: accelerate's rule.
            if getattr(scheduler, "_step_count", 0) > getattr(scheduler, "total_steps", float("inf")):
                break
            scheduler.step(*args, **kwargs)

    def _check_rhythm(self, updates: int) -> None:
        """Refuse a scheduler that is not stepped with the updates; scripts may leave out those that were skipped."""
        if self._stepped_at is not None:
            gap = updates - self._stepped_at
            self._late = self._late + 1 if gap > 1 else 0
            if self._late == 3 or gap >= max(2, self._pass_updates):
                raise ValueError(
                    f"the scheduler was stepped after {self._stepped_at} updates and then after {updates}: one that "
                    "infobatch.prepare() returned is stepped after every update, and gradients are accumulated by "
                    "accelerator.accumulate(); leave one that counts epochs to accelerator.prepare()"
                )
        self._stepped_at = updates

    def __getattr__(self, name: str) -> Any:
        if name == "prepared":  # unpickling asks before there is anything to ask
            raise AttributeError(name)
        return getattr(self.prepared, name)


def steps_by_update(scheduler: Any) -> bool:
    """Whether it is a prepared schedule of updates: not one of validations, nor one that another engine steps."""
    return type(scheduler) is AcceleratedScheduler and not isinstance(scheduler.scheduler, ReduceLROnPlateau)


def warn_of_others(accelerator: Accelerator, ours: Sequence[PassScheduler]) -> None:
    """Say so if a schedule is left to count updates, of which a pruned training makes fewer."""
    known = {id(each.prepared) for each in ours}
    apart = [each for each in accelerator._schedulers if id(each) not in known and steps_by_update(each)]
    if apart:
        warnings.warn(
            f"a {type(apart[0].scheduler).__name__} was not given to infobatch.prepare(): if it is stepped with every "
            "update, it will not reach its end, because a pruned training makes fewer of them",
            stacklevel=4,
        )
    elif not accelerator._schedulers and any(_is_scheduled(each.optimizer) for each in accelerator._optimizers):
        warnings.warn(
            "the optimizer has a learning-rate scheduler that was not given to infobatch.prepare(): if it is stepped "
            "with every update, it will not reach its end, because a pruned training makes fewer of them",
            stacklevel=4,
        )


def _is_scheduled(optimizer: Any) -> bool:
    """Whether a scheduler of torch watches the steps of an optimizer; torch marks the method."""
    return bool(getattr(optimizer.step, "_wrapped_by_lr_sched", False))
