"""Walking the passes of an accelerate script, and booking what its batches come to."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from ..core.distributed import gather
from ..core.ending import note
from ..core.meeting import Meeting
from ..core.schedule import EpochSchedule
from ..core.training import Training
from .batch import Batch
from .loader import LoaderGeometry, draws_nothing
from .notices import ScriptNotices
from .order import Order
from .rates import ScriptRates


class PassWalk:
    """Hands out the batches of one pass after the other, and ends each when all of it was walked.

    Args:
        accelerator (Accelerator): The run's.
        training (Training): Whose passes, with an :class:`.EpochSchedule`.
        geometry (LoaderGeometry): How accelerate cuts an epoch into steps.
        order (Order): In which they are walked.
        before_first (Callable[[], None]): Called at the begin of the first walk.

    Attributes:
        walks (int): Walks that were begun in this process.
        in_hand (Batch, optional): The batch that was handed out last.
        iterations (int): Batches that were weighed, in all processes of the run so far.
        updates_done (int): Optimiser steps that were made.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        training: Training,
        geometry: LoaderGeometry,
        order: Order,
        before_first: Callable[[], None],
    ) -> None:
        self._accelerator = accelerator
        self._training = training
        self._geometry = geometry
        self._order = order
        self._before_first = before_first
        self.walks = 0
        self.iterations = 0
        self.updates_done = 0
        self._notices = ScriptNotices(accelerator.is_main_process)
        self._rates = ScriptRates(accelerator, training)
        self._meeting = Meeting()
        self._time_before = 0.0
        self.restart(0.0)

    def restart(self, wall_time_s: float) -> None:
        """Stand where the training stands, with no batch in hand, after so many seconds of training."""
        self.in_hand: Batch | None = None
        self._touched = False  # whether anything was weighed in the walk in hand
        self._begun: tuple[int, int] | None = None  # pass and position where it began
        self._late: list[tuple[Batch, Tensor, Tensor | None]] = []
        self._nonfinite_known = self._training.store.num_nonfinite
        self._time_before = wall_time_s
        self._started = time.perf_counter()

    @property
    def wall_time_s(self) -> float:
        """Seconds of the training, without the time between runs."""
        return self._time_before + time.perf_counter() - self._started

    # ---- where it stands ---------------------------------------------------------------------------

    @property
    def schedule(self) -> EpochSchedule:
        """The training as passes."""
        assert isinstance(self._training.schedule, EpochSchedule)
        return self._training.schedule

    @property
    def batches(self) -> int:
        """Steps of the current pass."""
        return self._training.batches

    @property
    def batches_done(self) -> int:
        """Of these, the ones that are done."""
        return math.ceil(self._training.visited / self._training.pass_batch)

    @property
    def is_pass_over(self) -> bool:
        """Whether all of the current pass was walked, which is not booked yet."""
        return self._training.visited > 0 and self.batches_done >= self.batches

    @property
    def length(self) -> int:
        """Steps of the current pass; of an unpruned epoch before the first walk, by which scripts size schedules."""
        return self.batches if self.walks else self._geometry.epoch_batches

    @property
    def _visits(self) -> int:
        """Visits of the current pass, over all processes; without what ``drop_last`` leaves out."""
        plan = self._training.plan
        planned = self.schedule.num_samples if plan is None else len(plan)
        return min(planned, self.batches * self._training.pass_batch)

    @property
    def _is_even(self) -> bool:
        """Whether every batch of the current pass is full, so that all processes make as many steps."""
        plan = self._training.plan
        return plan is not None and self._visits % self._training.pass_batch == 0

    # ---- a walk ------------------------------------------------------------------------------------

    def walk(self, prepared: DataLoader) -> Iterator[Any]:
        """Walk a new pass; the rest of the pass in hand after a resume, or if nothing was weighed of it so far.

        Args:
            prepared (DataLoader): What accelerate made of the loader over the plans.
        """
        training = self._training
        if self._touched or self.is_pass_over:
            self.finish_pass()  # it was broken off, or a state was saved at its very end
        if not self.walks:
            self._before_first()
        if training.finished:
            self._notices.beyond_the_end(training)
        self.walks += 1
        walk, self.in_hand = self.walks, None
        training.open_pass()
        self.settle_late()  # only now: on no process may they change the plan
        current = training.pass_index
        if self._begun is not None and self._begun[0] == current:  # of the walk before nothing was weighed
            training.visited, training.own_skipped = self._begun[1], 0
        start = training.visited
        self._begun = (current, start)
        batches, cut = self._batches_from(prepared)
        for index, batch in batches:
            self._settle()
            self.in_hand = Batch(index, training.weights(index), training.pass_index, training.lr_factor())
            yield batch
            if walk != self.walks:
                raise ValueError(
                    "the train dataloader is walked by two iterators at once: another one began a pass in the midst of "
                    "this one; let one walk end before the next begins"
                )
        if cut is not None:
            cut.end()  # type: ignore[attr-defined] # as accelerate does at the end of its own walks
        self._settle()
        if training.pass_index != current:
            return  # merge() has ended it with its last batch
        # Where some processes have no last batch, the others still train on theirs: they meet at the next walk.
        meets = not self._geometry.ragged or self._is_even
        if any(gather(self._touched)) if meets else self._touched or self.in_hand is None:
            training.visited = self._visits  # also where the last batch was the other processes'
            if meets:
                self.finish_pass()
        else:  # a walk of which nothing is weighed counts for nothing
            training.visited, training.own_skipped = start, 0
            self._notices.idle(start)

    def _batches_from(self, prepared: DataLoader) -> tuple[Iterator[tuple[Tensor, Any]], DataLoader | None]:
        """Indices and batches of the rest of the pass, and the loader if they end before its own do."""
        training, done = self._training, self.batches_done
        prepared.set_epoch(training.pass_index)  # type: ignore[attr-defined]
        loader = self._order.rest(prepared, done)
        loader.iteration = training.pass_index  # type: ignore[attr-defined]
        batches = iter(loader)
        with draws_nothing(loader) if done else contextlib.nullcontext():
            first = next(batches, None)
        if self._is_even:
            loader.remainder = -1  # every batch is full; accelerate takes it from the size of the data set
        rest = itertools.chain([] if first is None else [first], batches)
        if self._order.outlasts(self.batches):
            return itertools.islice(rest, self.batches - done), loader
        return rest, None

    def take(self, batch: Batch, ranked: Tensor, log_snr: Tensor | None) -> None:
        """Book a batch whose losses were weighed: once, and also after its pass has ended.

        Args:
            batch (Batch): The one in hand.
            ranked (Tensor): What its samples are ranked by, shape ``(B,)``, float32.
            log_snr (Tensor, optional): Their noise levels, shape ``(B,)``.
        """
        self._rates.weighed(batch.lr_factor)
        if batch.is_weighed:
            return
        batch.is_weighed = True
        self.iterations += 1
        self.updates_done += self._accelerator.sync_gradients
        if batch.is_settled:
            self._late.append((batch, ranked.detach(), log_snr))
            return
        self._training.record(batch.index, ranked, log_snr=log_snr)
        self._touched = True
        self._advance()
        if self.is_pass_over and self._accelerator.is_main_process:
            note(self._training.pass_index + 1, self.schedule.num_passes)  # a script may stop here by a break

    def merge(self, timeout_s: float) -> None:
        """Exchange what the processes know; every process must call it. A pass that is over is booked.

        Args:
            timeout_s (float): Seconds to wait for the other processes.

        Raises:
            ValueError: If they have not come by then.
        """
        self._meeting.wait("infobatch.merge()", timeout_s)
        if self.is_pass_over:
            self.finish_pass()
        self.settle_late()
        self._training.merge()

    def _settle(self) -> None:
        """Count the visits of a batch that was handed out and not weighed, as after a loss that is NaN."""
        batch = self.in_hand
        if batch is None or batch.is_weighed or batch.is_settled:
            return
        batch.is_settled = True
        self._training.own_skipped += len(batch.index)
        self._advance()

    def settle_late(self) -> None:
        """Take down what was weighed after its pass had ended, as loops do that fetch one batch ahead."""
        late, self._late = self._late, []
        for batch, ranked, log_snr in late:
            self._training.record(batch.index, ranked, log_snr=log_snr)
            self._training.correct(batch.pass_index, len(batch.index))

    def _advance(self) -> None:
        """Move on by the batch in hand, of all processes."""
        self._training.advance(min(self._training.pass_batch, self._visits - self._training.visited))

    # ---- the end of a pass -------------------------------------------------------------------------

    def finish_pass(self) -> None:
        """End the pass, and say what it came to; every process must call it."""
        self._touched = False
        training = self._training
        entry = training.finish_pass()
        if training.finished:
            self._rates.training_over()
        found = training.store.num_nonfinite
        fresh, self._nonfinite_known = found - self._nonfinite_known, found
        self._notices.pass_done(training, entry, fresh, self.wall_time_s)
