"""Learning-rate schedules of torch, stepped by progress."""

from __future__ import annotations

import warnings
from typing import Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from ..core.checks import whole_number
from ..core.lengths import length_of
from ..core.schedule import EpochSchedule
from .passes import Passes
from .walk import Walk


class ProgressScheduler:
    """Takes a scheduler as far as the unpruned training would have, whatever the number of batches.

    A pruned pass has fewer batches, so that some calls of :meth:`step` step several times; where a plan has as many
    as a full pass, each steps once. Everything else, such as ``state_dict``, is the scheduler's own, and how far it
    is it says itself (``last_epoch``). Made by :meth:`.InfoBatch.schedule`.

    Args:
        passes (Passes): Whose progress.
        scheduler (LRScheduler): Made for the unpruned training.
        interval (str): ``'step'`` or ``'epoch'``: when :meth:`step` is called.
        every (int): Batches to an optimiser step.
        partial (bool): Whether fewer batches at the end of a pass make a step as well.

    Attributes:
        scheduler (LRScheduler): As above.

    Raises:
        ValueError: As :meth:`.InfoBatch.schedule` describes.
    """

    def __init__(self, passes: Passes, scheduler: LRScheduler, interval: str, every: int, partial: bool) -> None:
        if interval not in ("step", "epoch"):
            raise ValueError(f"interval={interval!r} is neither 'step' nor 'epoch': when is step() called?")
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError("ReduceLROnPlateau goes by validations, not by progress: step it yourself after each")
        if not hasattr(scheduler, "last_epoch"):
            raise ValueError(
                f"a {type(scheduler).__name__} does not say how many steps it has taken, and cannot follow the "
                "progress: use a SequentialLR or a LambdaLR in its place"
            )
        if scheduler.last_epoch > 0 and passes.is_new:
            raise ValueError(
                f"the {type(scheduler).__name__} has taken {scheduler.last_epoch} steps already, the training none: "
                "hand it over at its begin, and load its state after infobatch.schedule()"
            )
        self.scheduler = scheduler
        self._passes = passes
        self._interval = interval
        self._every = whole_number("every", every, 1, "it is the number of batches to an optimiser step")
        self._partial = bool(partial)
        self._walk: Walk | None = passes.walk  # whose steps were not all called here
        self._calls = 0
        self._is_used = False
        passes.schedulers.add(self)
        if (optimizer := getattr(scheduler, "optimizer", None)) is not None:
            passes.rates.follow(optimizer)
        if interval == "step" and passes.sizes.batch_size is None:
            raise ValueError(
                "a schedule by steps needs to know the batches of a pass: make infobatch.loader() first, or give "
                "InfoBatch the global batch_size"
            )
        self._warn_of_length()

    def step(self) -> None:
        """Move on to where the progress stands; sometimes by several steps, sometimes by none.

        Raises:
            ValueError: If it is called in another rhythm than ``interval`` and ``every`` say.
        """
        self._is_used = True
        self._calls += 1
        self._move_to(self._steps_due() if self._interval == "step" else self._passes_due())

    def _warn_of_length(self) -> None:
        """Say so if it is made for another number of steps than the training makes."""
        schedule = self._passes.pruner.schedule
        assert isinstance(schedule, EpochSchedule)
        if self._interval == "step" and self._passes.sizes.batch_size is not None:
            total = self._steps_before(schedule.num_passes)
            length = length_of(self.scheduler)
            if length is not None and abs(length - total) > schedule.num_passes:
                warnings.warn(
                    f"the {type(self.scheduler).__name__} is made for {length} steps, this training makes {total} "
                    f"({schedule.num_passes} passes): its rate will not be at its end with the training; give both the "
                    "same length, num_epochs= or max_train_steps=, or say interval='epoch' or every=N where that is "
                    "how it is stepped",
                    stacklevel=4,
                )

    def _check_rhythm(self, walk: Walk) -> None:
        """Refuse calls once an epoch where they were to be once a step, and the other way round."""
        if self._interval == "epoch":
            if self._calls != 1:
                raise ValueError(
                    f"step() was called {self._calls} times in pass {walk.pass_index + 1}: a schedule with "
                    "interval='epoch' is stepped once, after every epoch from the first on; for one call after each "
                    "optimiser step use interval='step'"
                )
            return
        batches = walk.weighed // (walk.batch or self._passes.sizes.batch_size or 1)
        if batches >= 4 * self._every and 5 * self._calls * self._every <= 3 * batches:
            raise ValueError(
                f"step() was called {self._calls} times in pass {walk.pass_index + 1}, in which {batches} batches were "
                f"weighed: with interval='step' and every={self._every} it is called after each optimiser step, of "
                f"{self._every} batches; use interval='epoch' for one call after each epoch, or every=N where "
                "gradients are accumulated over N batches"
            )
        if self._partial and batches % self._every and self._calls == batches // self._every:
            raise ValueError(
                f"step() was called {self._calls} times in pass {walk.pass_index + 1}, in which {batches} batches were "
                f"weighed: with every={self._every} the last {batches % self._every} make a step of their own; if your "
                "loop makes none of them, say infobatch.schedule(..., partial=False)"
            )

    def begin_pass(self, pass_index: int, last: Walk | None) -> None:
        """Make up for what was not stepped before a pass: skipped batches, or an epoch whose end a kill cut off.

        Args:
            pass_index (int): Passes that are done, up to the end of the schedule.
            last (Walk, optional): The walk before.

        Raises:
            ValueError: If the scheduler was called in another rhythm there than ``interval`` and ``every`` say.
        """
        if not self._is_used and not self._passes.is_resumed:
            return  # nobody has called it so far
        if last is not None and last is not self._walk and last.finished and last.pass_index < pass_index:
            self._check_rhythm(last)
        if last is None or last.finished:
            self._walk, self._calls = None, 0
        if self._interval == "step":
            pass_index = self._steps_before(pass_index)
        if pass_index > self.scheduler.last_epoch:
            with warnings.catch_warnings():  # torch takes a resumed optimizer for a new one
                warnings.simplefilter("ignore")
                self._move_to(pass_index)

    def _move_to(self, due: int) -> None:
        if due < self.scheduler.last_epoch and self._follows_its_arguments:
            self.scheduler.last_epoch = due - 1  # resumed with larger batches, hence fewer steps
        for _ in range(due - self.scheduler.last_epoch):
            self.scheduler.step()

    @property
    def _follows_its_arguments(self) -> bool:
        """Whether its length is of this run; a ``LambdaLR`` keeps its function out of checkpoints."""
        return isinstance(self.scheduler, LambdaLR)

    def _steps_due(self) -> int:
        passes, walk, schedule = self._passes, self._passes.walk, self._passes.pruner.schedule
        batch = passes.sizes.batch_size if walk is None or walk.batch is None else walk.batch
        assert batch is not None
        if walk is None or walk.pass_index >= schedule.num_passes:
            return self._steps_before(passes.pruner.pass_index)
        whole = self._updates(-(-walk.end // batch))
        done = min(-(-walk.start // batch) // self._every + self._calls, whole)
        before, after = self._steps_before(walk.pass_index), self._steps_before(walk.pass_index + 1)
        return before + (after - before) * done // max(1, whole)

    def _steps_before(self, pass_index: int) -> int:
        """Steps of the unpruned training before a pass.

        A schedule out of a checkpoint brings its length along, in batches of that run.
        """
        schedule = self._passes.pruner.schedule
        assert isinstance(schedule, EpochSchedule)
        resumed = None if self._follows_its_arguments else self._passes.sizes.resumed_batches
        batches = resumed or self._passes.sizes.full_batches
        last = schedule.num_passes - 1
        if pass_index <= last:
            return pass_index * self._updates(batches)
        part, whole = schedule.part(last)
        return last * self._updates(batches) + self._updates(batches * part // whole)

    def _passes_due(self) -> int:
        walk, pruner = self._passes.walk, self._passes.pruner
        done = pruner.pass_index if walk is None else walk.pass_index + walk.touched
        return min(done, pruner.schedule.num_passes)

    def _updates(self, batches: int) -> int:
        return -(-batches // self._every) if self._partial else batches // self._every

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # unpickling asks before there is anything to ask
            raise AttributeError(name)
        return getattr(self.scheduler, name)
