"""Progress arithmetic: how passes of pruned data map onto the host's schedule.

Progress is counted in samples of full data: a pass over N samples advances it by N, however many of them
were visited. All arithmetic is in integers, so that a resumed run takes the very same steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from .plan import Plan


class Schedule(ABC):
    """The host's training, seen as passes over the data.

    Args:
        num_samples (int): Size N of the data set.
        batch_size (int): Global batch size B, over all processes.

    Attributes:
        total_samples (int): Progress S of the whole training, in samples of full data.
        num_passes (int): Number of passes; the last one may be partial.
        total_steps (int): Steps that the per-iteration schedulers of the unpruned run take.
        loop (str): What the host counts its training in, ``'epochs'`` or ``'iterations'``.
    """

    loop: str
    total_samples: int
    num_passes: int
    total_steps: int

    def __init__(self, num_samples: int, batch_size: int) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size

    def start(self, pass_index: int) -> int:
        """Progress at the start of a pass: ``min(p * N, S)`` samples."""
        return min(pass_index * self.num_samples, self.total_samples)

    def progress(self, pass_index: int) -> float:
        """Progress at the start of a pass as a share of the training, in [0, 1]."""
        return self.start(pass_index) / self.total_samples

    def steps_at(self, pass_index: int, done: int, batches: int) -> int:
        """Scheduler steps that are due after ``done`` of the ``batches`` of a pass, advancing evenly.

        Returns:
            int: Exactly :meth:`steps_before` of the next pass when all batches are done.
        """
        before, after = self.steps_before(pass_index), self.steps_before(pass_index + 1)
        return after if batches == 0 else before + (after - before) * done // batches

    def settings(self) -> dict[str, Any]:
        """What a state says of its schedule, as plain numbers."""
        return {"loop": self.loop, "total_steps": self.total_steps}

    def take_over(self, settings: Mapping[str, Any]) -> None:
        """Carry on from the schedule of a resumed run, whose :meth:`settings` these are."""
        return None  # an iteration is one in any schedule of iterations

    @abstractmethod
    def steps_before(self, pass_index: int) -> int:
        """Steps that the host's per-iteration schedulers have taken at the start of a pass."""

    def fit(self, plan: Plan, pass_index: int) -> Plan:
        """The part of a plan that the pass visits."""
        if plan.batch_size is not None:
            return plan.first(self.full_batches(pass_index) * plan.batch_size)
        return self._fit(plan, pass_index)

    @abstractmethod
    def _fit(self, plan: Plan, pass_index: int) -> Plan:
        """The same of a plan whose batches are as large as the host's."""

    @property
    @abstractmethod
    def whole_batches(self) -> int:
        """Iterations of a pass that is neither pruned nor partial."""

    @abstractmethod
    def full_batches(self, pass_index: int) -> int:
        """Iterations of a pass that is not pruned."""

    @abstractmethod
    def full_visits(self, pass_index: int) -> int:
        """Visits that the unpruned run makes in the span of a pass."""

    def full_visits_before(self, pass_index: int) -> int:
        """Visits that the unpruned run makes before a pass."""
        return self._sum_before(self.full_visits, pass_index)

    def full_batches_before(self, pass_index: int) -> int:
        """Iterations that the unpruned run makes before a pass."""
        return self._sum_before(self.full_batches, pass_index)

    def _sum_before(self, count: Callable[[int], int], pass_index: int) -> int:
        """Sum over the passes before one, of which there may be thousands: all but the schedule's last are alike."""
        last = self.num_passes - 1
        if pass_index <= last:
            return pass_index * count(0)
        beyond = pass_index - self.num_passes
        return last * count(0) + count(last) + beyond * count(self.num_passes)

    def plan_visits(self, pass_index: int) -> int:
        """Visits that a plan of a pass is drawn for: where a resumed run has others, the pass is drawn again."""
        return self.full_visits(pass_index)

    def batches(self, plan: Plan, pass_index: int) -> int:
        """Iterations that walk a fitted plan."""
        return len(plan) // (plan.batch_size or self.batch_size) if plan.pruned else self.full_batches(pass_index)


class EpochSchedule(Schedule):
    """A training of ``num_epochs`` passes, or of as many as ``max_steps`` steps take; the last one may then be partial.

    Args:
        num_samples (int): Size N of the data set.
        num_epochs (int, optional): Number of epochs of the host, at least 1; not looked at beside ``max_steps``.
        batch_size (int): Global batch size B.
        epoch_batches (int, optional): Iterations of one unpruned epoch, as the host's loader counts them.
            Defaults to ceil(N / B).
        accumulated (int): Iterations that make one step of the host's per-iteration schedulers; fewer at an epoch's
            end make one as well. Defaults to 1.
        epoch_visits (int, optional): Visits of an unpruned epoch, where a ``drop_last`` of other batches leaves some
            out. Defaults to those in ``epoch_batches``.
        max_steps (int, optional): Steps of the host's per-iteration schedulers in the whole unpruned training, at
            least 1. Defaults to the steps of ``num_epochs`` epochs.

    Attributes:
        pass_steps (int): Steps of the host's per-iteration schedulers in a pass, as many as in an unpruned epoch of
            the run that made them.
        max_steps (int, optional): As above.
    """

    loop = "epochs"

    def __init__(
        self,
        num_samples: int,
        num_epochs: int | None,
        batch_size: int,
        epoch_batches: int | None = None,
        accumulated: int = 1,
        epoch_visits: int | None = None,
        max_steps: int | None = None,
    ) -> None:
        super().__init__(num_samples, batch_size)
        self._epoch_batches = math.ceil(num_samples / batch_size) if epoch_batches is None else epoch_batches
        whole = min(num_samples, self._epoch_batches * batch_size)
        self._epoch_visits = whole if epoch_visits is None else epoch_visits
        self.pass_steps = math.ceil(self._epoch_batches / accumulated)
        self.max_steps = max_steps
        if max_steps is None:
            if num_epochs is None or num_epochs < 1:
                raise ValueError(f"num_epochs={num_epochs}: the training needs at least one pass over the data")
            self.num_passes, self._last_batches = num_epochs, self._epoch_batches
            self.total_steps = num_epochs * self.pass_steps
        else:
            if max_steps < 1:
                raise ValueError(f"max_train_steps={max_steps}: the training needs at least one step")
            self.num_passes = math.ceil(max_steps / self.pass_steps)
            rest = max_steps - (self.num_passes - 1) * self.pass_steps
            self._last_batches = min(rest * accumulated, self._epoch_batches)
            self.total_steps = max_steps
        last = num_samples * self._last_batches // self._epoch_batches
        self.total_samples = (self.num_passes - 1) * num_samples + last

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "pass_steps": self.pass_steps}

    def take_over(self, settings: Mapping[str, Any]) -> None:
        # Schedulers come out of a checkpoint with their own length: they go on in its unit.
        theirs = int(settings.get("pass_steps", self.pass_steps))
        if theirs != self.pass_steps:
            self.pass_steps, self.total_steps = theirs, int(settings.get("total_steps", self.total_steps))

    def steps_before(self, pass_index: int) -> int:
        if pass_index >= self.num_passes:
            return self.total_steps
        return pass_index * self.pass_steps

    @property
    def whole_batches(self) -> int:
        return self._epoch_batches

    def _fit(self, plan: Plan, pass_index: int) -> Plan:
        if not self._is_partial(pass_index):
            return plan
        batches = len(plan) * self._last_batches // (self._epoch_batches * self.batch_size)
        return plan.first(max(1, batches) * self.batch_size if plan.pruned else self.full_visits(pass_index))

    def full_batches(self, pass_index: int) -> int:
        return self._last_batches if self._is_partial(pass_index) else self._epoch_batches

    def full_visits(self, pass_index: int) -> int:
        if self._is_partial(pass_index):
            return min(self._epoch_visits, self._last_batches * self.batch_size)
        return self._epoch_visits

    def plan_visits(self, pass_index: int) -> int:
        # What drop_last leaves out is in the plan.
        return self.full_visits(pass_index) if self._is_partial(pass_index) else self.num_samples

    def part(self, pass_index: int) -> tuple[int, int]:
        """Batches of an unpruned pass, and of one that is whole."""
        return self.full_batches(pass_index), self._epoch_batches

    def _is_partial(self, pass_index: int) -> bool:
        return pass_index == self.num_passes - 1 and self._last_batches < self._epoch_batches


class IterSchedule(Schedule):
    """A training of ``max_iters`` iterations of the unpruned run: S = max_iters * B samples.

    Full passes leave out a random remainder of N mod B samples, as ``drop_last`` does, so that every batch
    is full. The last pass is partial where S is no multiple of N.

    Args:
        num_samples (int): Size N of the data set.
        max_iters (int): Iterations of the host, at least 1.
        batch_size (int): Global batch size B, at most N.

    Raises:
        ValueError: If a single batch is larger than the data set.
    """

    loop = "iterations"

    def __init__(self, num_samples: int, max_iters: int, batch_size: int) -> None:
        super().__init__(num_samples, batch_size)
        if max_iters < 1:
            raise ValueError(f"max_iters={max_iters}: the training needs at least one iteration")
        if batch_size > num_samples:
            raise ValueError(
                f"one global batch holds {batch_size} samples but the data set only {num_samples}: there is nothing "
                "to prune within a pass; use a smaller batch size or repeat the data set"
            )
        self.total_samples = max_iters * batch_size
        self.num_passes = math.ceil(self.total_samples / num_samples)
        self.total_steps = max_iters

    def steps_before(self, pass_index: int) -> int:
        return self.start(pass_index) // self.batch_size

    @property
    def whole_batches(self) -> int:
        return self.num_samples // self.batch_size

    def _fit(self, plan: Plan, pass_index: int) -> Plan:
        # At least one batch: a remainder smaller than a batch still belongs to the host's iterations.
        span = self.full_visits(pass_index)
        batches = len(plan) * span // (self.num_samples * self.batch_size)
        return plan.first(max(1, batches) * self.batch_size)

    def full_batches(self, pass_index: int) -> int:
        return max(1, self.full_visits(pass_index) // self.batch_size)

    def full_visits(self, pass_index: int) -> int:
        return self.start(pass_index + 1) - self.start(pass_index)
