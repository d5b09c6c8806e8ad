"""Learning-rate schedules that follow the progress through passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import LambdaLR


class PassScheduler:
    """A prepared scheduler whose steps are those that the unpruned run would have taken at the same progress.

    It takes the place of accelerate's: ``step()`` is called where it was, after each optimiser step, and moves the
    scheduler on by as many steps as are due, sometimes none. Everything else is the wrapped one's.

    Args:
        prepared (AcceleratedScheduler): What ``accelerator.prepare`` made of the scheduler.
        steps_due (Callable[[], int]): Steps that the scheduler is to have taken by now, since the training began.
        updates_done (Callable[[], int]): Optimiser steps made by now.

    Raises:
        ValueError: If the scheduler does not say how many steps it has taken.
    """

    def __init__(
        self, prepared: AcceleratedScheduler, steps_due: Callable[[], int], updates_done: Callable[[], int]
    ) -> None:
        self._prepared = prepared
        self._steps_due = steps_due
        self._updates_done = updates_done
        self._stepped_at: int | None = 0
        if not hasattr(prepared.scheduler, "last_epoch"):
            raise ValueError(
                f"a {type(prepared.scheduler).__name__} does not say how many steps it has taken, and cannot follow "
                "the progress: give infobatch.prepare() a SequentialLR or a LambdaLR in its place"
            )
        self._begin = prepared.scheduler.last_epoch  # 0, unless the scheduler was handed over in its midst

    @property
    def follows_its_arguments(self) -> bool:
        """Whether its length is that of this run, and not one that comes with a checkpoint.

        A ``LambdaLR``, as all of diffusers' schedulers are, keeps its function out of checkpoints.
        """
        return isinstance(self._prepared.scheduler, LambdaLR)

    def forget(self) -> None:
        """Forget when it was stepped last; a loaded state may be from elsewhere in the training."""
        self._stepped_at = None

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Move on to where the progress stands.

        Raises:
            ValueError: If it is not called after every optimiser step.
        """
        if not self._prepared.gradient_state.sync_gradients:
            self._prepared.step(*args, **kwargs)  # which only counts here
            return
        updates = self._updates_done()
        # Accumulation across the ends of passes makes a little more of an update.
        most = 1 if self._prepared.gradient_state.sync_with_dataloader else 2
        if self._stepped_at is not None and updates > self._stepped_at + most:
            raise ValueError(
                f"the scheduler was stepped after {self._stepped_at} updates and then after {updates}: one that "
                "infobatch.prepare() returned is stepped after every update, and gradients are accumulated by "
                "accelerator.accumulate(); leave one that counts epochs to accelerator.prepare()"
            )
        self._stepped_at = updates
        if any(optimizer.step_was_skipped for optimizer in self._prepared.optimizers):
            return  # gradients overflowed; the step is made up for after the next
        scheduler = self._prepared.scheduler
        missing = self._begin + self._steps_due() - scheduler.last_epoch
        if missing < 0 and self.follows_its_arguments:  # resumed with larger batches, hence fewer steps
            scheduler.last_epoch += missing - 1
            missing = 1
        for _ in range(missing):
            # A schedule that ends for good, as OneCycleLR's, is not asked beyond its end: accelerate's rule.
            if getattr(scheduler, "_step_count", 0) > getattr(scheduler, "total_steps", float("inf")):
                break
            scheduler.step(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_prepared":  # unpickling asks before there is anything to ask
            raise AttributeError(name)
        return getattr(self._prepared, name)
