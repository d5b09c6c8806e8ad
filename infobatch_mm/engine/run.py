"""A run that is wired: all there is of it between its first hook point and its last."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from mmengine.runner import BaseLoop
from torch import Tensor

from ..core import EpochSchedule, Pruner, Training, Watcher
from ..core.devices import moved
from ..core.lr_factor import LearningRateFactor
from ..core.recalibration import Recalibration
from ..losses import AttachedViews, LossWeigher
from . import process_state
from .loader import BatchIndices, IndexedLoader
from .param_schedule import SchedulerPacer, renew_max_iters
from .process_state import ValidationAside
from .recalibration import models_of, recalibrate
from .samplers import InfoBatchSampler
from .takeover import watched_visits


class Run(ABC):
    """What a :class:`PrunedRun`, whose loop is ours, and a :class:`WatchedRun`, whose loop is the host's, share.

    Args:
        training (Training): Its passes, scores and books.
        loader (IndexedLoader): Its training data.
        views (AttachedViews): Of its model's losses.
        weigher (LossWeigher): Weighs them.

    Attributes:
        training (Training): As above, like ``loader`` and ``weigher``.
        batch (BatchIndices): Samples of the batch in hand, from the begin of its iteration on.
        processes (Mapping, optional): What all processes hold, while a checkpoint is written.
    """

    training: Training

    def __init__(self, loader: IndexedLoader, views: AttachedViews, weigher: LossWeigher) -> None:
        self.loader, self.weigher = loader, weigher
        self._views, self._views_due = views, False
        self.batch: BatchIndices
        self._updates_before: list[int] = []
        self.processes: Mapping[str, Any] | None = None

    # ---- a batch ----------------------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Look at the model's losses again in the first batch: other hooks may exchange them where an epoch begins."""
        self._views_due = True

    def begin_batch(self, runner: Any, data_batch: Any) -> None:
        """Look up the weights of a batch."""
        due, self._views_due = self._views_due or not self._views.in_place, False
        if due and self._views.renew():
            runner.logger.info(
                "InfoBatch: the model's losses or batch augmentations were exchanged and are weighed anew"
            )
            self.say_what_is_not_separable(runner)
        # Taken here and kept: another hook may walk the loader before the step is over.
        self.batch = runner.train_dataloader.take(data_batch)
        self._updates_before = process_state.inner_counts(runner)
        self._weigh(self.batch.indices)

    @abstractmethod
    def _weigh(self, indices: Tensor) -> None:
        """Give the weigher the weights of these samples."""

    def record(self, runner: Any) -> None:
        """Take the scores that the batch's losses left behind.

        Raises:
            ValueError: If the model was updated by a loss that was not seen.
        """
        reached = self.weigher.reached
        scores, valid = self.weigher.end()
        indices, replaced = self.batch
        if scores is not None and valid is not None:
            # A pipeline that returned None had another sample in this one's place.
            valid = valid & ~moved(replaced, valid.device) if bool(replaced.any()) else valid
            if self.training.store.rule.takes_norms:
                self.training.store.rule.take_source(self.weigher.norms_of)
            self.training.record(indices, scores, valid)
        elif reached or process_state.inner_counts(runner) != self._updates_before:
            raise ValueError(f"{type(runner.model).__name__} computed no loss that InfoBatchHook has a view of")
        else:  # a train_step left it out, as after a NaN
            self.training.own_skipped += len(indices)

    @abstractmethod
    def advance(self, runner: Any, batch_idx: int) -> bool:
        """Count the visits of the batch; returns whether a pass was booked with them."""

    def say_what_is_not_separable(self, runner: Any) -> None:
        """Name the losses whose pruned passes optimise another objective; a run that is not pruned has none."""
        return None

    # ---- resume and checkpoints -------------------------------------------------------------------

    @property
    @abstractmethod
    def steps_taken(self) -> int:
        """Steps of the host's schedulers that were taken by progress, for the checkpoint."""

    @abstractmethod
    def host_steps(self, runner: Any) -> int:
        """Iterations of the unpruned run that the host's schedulers stand at."""

    @abstractmethod
    def take_up(self, steps: int) -> None:
        """Have the schedulers, which come out of the host's checkpoint, counted as so many steps on."""

    @abstractmethod
    def resumed(self, runner: Any, state: Mapping[str, Any]) -> None:
        """Put back what a checkpoint of ours holds beside the training, as the last thing before it goes on."""

    def captured(self, runner: Any, alone: bool) -> dict[str, Any]:
        """What each process holds beside the host's checkpoint; see :func:`.process_state.capture`."""
        return process_state.capture(runner, alone=alone)

    def recalibrate(self, runner: Any, validates: bool = False) -> None:
        """Bring the model's running statistics to where uniform batches have them, if the user asks for it.

        Args:
            runner (Runner): The run.
            validates (bool): Whether for a validation, and not for a checkpoint. Defaults to False.
        """
        return None

    @contextmanager
    def exchanged(self, runner: Any) -> Iterator[None]:
        """Let rank 0 know what all processes hold while it writes a checkpoint, or two."""
        self.recalibrate(runner)
        self.training.store.merge()
        self.processes = self.captured(runner, alone=False)
        try:
            yield
        finally:
            self.processes = None


class PrunedRun(Run):
    """A run whose loop walks plans.

    Args:
        runner (Runner): The runner.
        loop (BaseLoop): One of ours.
        training (Pruner): Draws the plans.
        undo (ExitStack): Takes what gives the host's objects back.
        recalibration (Recalibration, optional): Of its model's running statistics. Defaults to None: they are the
            host's.
        loader, views, weigher: As for :class:`Run`.
    """

    training: Pruner

    def __init__(
        self,
        runner: Any,
        loop: BaseLoop,
        training: Pruner,
        loader: IndexedLoader,
        views: AttachedViews,
        weigher: LossWeigher,
        undo: ExitStack,
        recalibration: Recalibration | None = None,
    ) -> None:
        super().__init__(loader, views, weigher)
        self.training = training
        self._recalibration = recalibration
        self._recalibrated_at: int | None = None
        assert isinstance(loader.sampler, InfoBatchSampler)
        training.share_batches(loader.sampler.world)
        loader.sampler.bind(training)
        loop.pruner = training
        if training.scales_rates:
            optimizers = [each.optimizer for each in process_state.optim_wrappers(runner)]
            undo.callback(LearningRateFactor(optimizers, training.lr_factor).remove)
        self._pacer = SchedulerPacer(runner, self._steps_due)
        undo.callback(self._pacer.restore)
        self._validation = ValidationAside(runner)
        undo.callback(self._validation.restore)

    def begin_pass(self, runner: Any) -> None:
        """Draw the plan of the pass and tell the host how long the run will be."""
        training, schedule = self.training, self.training.schedule
        training.begin_pass()
        coming = min(training.pass_index + 1, schedule.num_passes)
        later = schedule.full_batches_before(schedule.num_passes) - schedule.full_batches_before(coming)
        renew_max_iters(runner, runner.iter - training.batches_done + training.batches + later)

    def _weigh(self, indices: Tensor) -> None:
        training, plan = self.training, self.training.plan
        assert plan is not None
        weights, factor = training.weights(indices), training.blank_factor(len(indices))
        self.weigher.begin(weights, plan.pruned, indices, plan.pair_weights, blank_factor=factor)

    def advance(self, runner: Any, batch_idx: int) -> bool:
        self.training.advance(len(self.batch.indices) * runner.world_size)
        return False  # the loop says when a pass is over

    def say_what_is_not_separable(self, runner: Any) -> None:
        if self._views.not_separable:
            runner.logger.info(
                "InfoBatch: these losses do not separate over samples; in pruned passes the mean of the samples' own "
                f"losses is optimised in their place, which is not unbiased: {', '.join(self._views.not_separable)}"
            )

    def recalibrate(self, runner: Any, validates: bool = False) -> None:
        if self._recalibration is None:
            return
        # A validation is of the average, where there is one: its weights are in the model's place then.
        models = models_of(runner)
        if validates and len(models) == 1 and self._recalibrated_at == self.training.visits:
            return  # as for the checkpoint just now
        for model in models[:1] if validates else models:
            recalibrate(self._recalibration, model, self.loader)
        self._recalibrated_at = self.training.visits

    def _steps_due(self) -> int:
        training = self.training
        return training.schedule.steps_at(training.pass_index, training.batches_done, training.batches)

    @property
    def steps_taken(self) -> int:
        return self._pacer.taken

    def host_steps(self, runner: Any) -> int:
        return self._pacer.taken

    def take_up(self, steps: int) -> None:
        self._pacer.taken = steps

    def resumed(self, runner: Any, state: Mapping[str, Any]) -> None:
        process_state.restore(runner, state)

    def captured(self, runner: Any, alone: bool) -> dict[str, Any]:
        return process_state.capture(runner, self._validation.generators, alone)


class WatchedRun(Run):
    """A run whose loop, sampler and order are the host's (``policy='none'``): its scores are recorded, and no more.

    Args:
        training (Watcher): Keeps the books.
        loader, views, weigher: As for :class:`Run`.
    """

    training: Watcher

    def __init__(self, training: Watcher, loader: IndexedLoader, views: AttachedViews, weigher: LossWeigher) -> None:
        super().__init__(loader, views, weigher)
        self.training = training

    def _weigh(self, indices: Tensor) -> None:
        self.weigher.begin(self.training.weights(indices), pruned=False)

    def advance(self, runner: Any, batch_idx: int) -> bool:
        done = self.training.pass_index
        self.training.observe(watched_visits(self.training, batch_idx))
        return self.training.pass_index > done

    @property
    def steps_taken(self) -> int:
        return 0

    def host_steps(self, runner: Any) -> int:
        return runner.iter

    def take_up(self, steps: int) -> None:
        return None  # the host's schedulers step by themselves

    def resumed(self, runner: Any, state: Mapping[str, Any]) -> None:
        if isinstance(self.training.schedule, EpochSchedule):
            self.training.visited = 0  # the host's own loop begins its epoch again
