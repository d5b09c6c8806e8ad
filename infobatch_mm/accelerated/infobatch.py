"""Pruned training in an accelerate script."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor
from torch.utils.data import DataLoader

from ..core import EpochSchedule, Pruner, PruningPolicy, Training, Watcher, build_policy
from ..core.checks import checked_length, whole_number
from ..core.distributed import require_equal
from ..core.last_layer import norms_to_come
from ..core.lengths import length_line
from ..core.meeting import PATIENCE_S
from ..core.score_rule import ScoreRule
from ..core.short_runs import short_run_line
from ..policies import NoPruning
from .batch import Batch, ranked_by
from .checkpoints import CheckpointEntry, alike
from .checks import check_accelerator, check_unprepared
from .loader import LoaderGeometry, PrunedLoader
from .model import ScriptModel
from .order import Order, OwnOrder, PlannedOrder
from .scheduler import PassScheduler, steps_by_update, warn_of_others
from .standing import ScriptStanding
from .updates import steps_due
from .walk import PassWalk


class AcceleratedInfoBatch(ScriptStanding, ScriptModel):
    """InfoBatch for a training script on accelerate, such as diffusers' examples.

    Its :meth:`prepare` takes the place of ``accelerator.prepare``; the batches stay what they were, the losses go
    through :meth:`weigh`. accelerate shares the data out among its processes as it does without us, whatever its
    ``split_batches``, ``dispatch_batches``, ``even_batches`` and gradient accumulation. The state is saved and loaded
    by ``accelerator.save_state`` and ``load_state``.

    Args:
        accelerator (Accelerator): The run's.
        dataloader (DataLoader): The training data, before it is prepared: a map-style data set, a batch size,
            ``shuffle=True`` or ``False``.
        num_epochs (int, optional): Passes over the data in the whole training, at least 1.
        prune_ratio (float, optional): Chance r that a well-learned sample is skipped, in [0, 1). Defaults to the
            policy's own, 0.5 for most.
        delta (float, optional): Share of the training after which every sample is visited, in (0, 1]. Defaults to the
            policy's own, 0.875 for most.
        max_train_steps (int, optional): Optimiser steps of the whole unpruned training, at least 1, where the script
            counts it so; takes the place of ``num_epochs``. The last pass may then be partial, and a pruned training
            makes fewer steps.
        policy (str | dict | PruningPolicy): ``'infobatch'``, ``'random'``, a registered policy of your own by its name
            or as ``dict(type=name, ...)``, or an instance; ``'none'`` keeps the loader's own sampler and order, records
            scores and weighs nothing. Defaults to ``'infobatch'``.
        seed (int): Seed of the draws, the same on every process. Defaults to 0.
        item_seed (bool): Whether items are read under a seed made of seed, pass and position, so that augmentations
            repeat after a resume. Defaults to False.
        score (str | dict | ScoreRule, optional): What samples are ranked by: ``'raw'``, their last loss, as in the
            paper; ``'ema'``, the average over their visits; ``'timestep'``, the average of losses over the mean loss at
            their noise level, which needs the ``log_snr`` of :meth:`weigh`: a denoising loss depends on its random
            timestep first of all; a registered score of your own by its name or as ``dict(type=name, ...)``; or an
            instance. Defaults to ``'raw'``, or ``'ema'`` where ``score_ema`` is given.
        score_ema (float, optional): Decay of the average, in [0, 1). Defaults to 0.9 for scores that are averages.
        fingerprint (str): Identifies the data set beyond its length; compared on resume. Defaults to ''.

    Raises:
        ValueError: If an argument is out of its range, not the same on every process, or the loader is one whose
            samples cannot be chosen by index.

    Example:
        >>> infobatch = AcceleratedInfoBatch(accelerator, train_dataloader, num_epochs=100)
        >>> model, optimizer, train_dataloader, lr_scheduler = infobatch.prepare(
        ...     model, optimizer, train_dataloader, lr_scheduler
        ... )
        >>> for epoch in range(infobatch.passes_done, infobatch.num_passes):
        ...     for batch in train_dataloader:
        ...         with accelerator.accumulate(model):
        ...             losses = F.mse_loss(model(batch["x"]), batch["y"], reduction="none")
        ...             accelerator.backward(infobatch.weigh(losses))
        ...             optimizer.step()
        ...             lr_scheduler.step()
        ...             optimizer.zero_grad()
        ...     infobatch.merge()
        ...     accelerator.save_state("checkpoint")
    """

    def __init__(
        self,
        accelerator: Accelerator,
        dataloader: DataLoader,
        num_epochs: int | None = None,
        prune_ratio: float | None = None,
        delta: float | None = None,
        *,
        max_train_steps: int | None = None,
        policy: str | Mapping[str, Any] | PruningPolicy = "infobatch",
        seed: int = 0,
        item_seed: bool = False,
        score: str | Mapping[str, Any] | ScoreRule | None = None,
        score_ema: float | None = None,
        fingerprint: str = "",
    ) -> None:
        check_accelerator(accelerator)
        num_epochs, max_train_steps = checked_length(num_epochs, max_train_steps)
        seed = whole_number("seed", seed, 0, "use 0 or a positive number")
        chosen = build_policy(policy, prune_ratio, delta)
        check_unprepared(dataloader)
        geometry = LoaderGeometry(accelerator, dataloader)
        self._accelerator = accelerator
        self._accumulated = accelerator.gradient_accumulation_steps
        # accelerate makes one step per process at each update, unless batches are split among them: as many here,
        # so that the learning rates are the same on any number of processes.
        self._per_update = 1 if accelerator.split_batches else accelerator.num_processes
        schedule = EpochSchedule(
            len(dataloader.dataset),  # type: ignore[arg-type]
            num_epochs,
            geometry.batch_size,
            geometry.epoch_batches,
            self._accumulated,
            max_steps=max_train_steps,
        )
        self._own_steps = schedule.settings()
        settings = (schedule, chosen, seed, geometry.shuffle, fingerprint, item_seed, score_ema, score)
        pruner: Training
        order: Order
        if isinstance(chosen, NoPruning):
            pruner = watcher = Watcher(*settings)
            order = OwnOrder(watcher, geometry)
        else:
            pruner = planner = Pruner(*settings)
            order = PlannedOrder(planner, geometry)
        require_equal(num_epochs=num_epochs, max_train_steps=max_train_steps, **pruner.identity())
        self._pruner, self._geometry, self._schedule = pruner, geometry, schedule
        self._walk = PassWalk(accelerator, pruner, geometry, order, self._check_schedulers)
        self._dataloader = dataloader
        self._rebuilt = order.rebuilt(dataloader)
        self._schedulers: list[PassScheduler] = []
        self._checkpoints: CheckpointEntry
        self._begin_model(self._pruner)
        self._last: tuple[Batch, Tensor] | None = None  # what was weighed last, and its losses
        for earlier in [each for each in accelerator._custom_objects if isinstance(each, AcceleratedInfoBatch)]:
            if alike(earlier._dataloader.dataset, dataloader.dataset):
                earlier._checkpoints.remove()  # of an attempt with another batch size
        self._checkpoints = CheckpointEntry(accelerator, self, self.check_state, pruner.store)
        if accelerator.is_main_process and (line := short_run_line(pruner)):
            warnings.warn(line, stacklevel=2)

    # ---- what the script calls ---------------------------------------------------------------------

    def prepare(self, *objects: Any, **kwargs: Any) -> Any:
        """``accelerator.prepare``, with the training data pruned and the schedulers following the progress.

        Args:
            objects: As for ``accelerator.prepare``; the train dataloader must be one of them. Learning-rate
                schedulers then step by progress: a pruned pass takes them as far as a full one. One that is stepped
                once per epoch is ``accelerator.prepare``'s; ``ReduceLROnPlateau`` is left as it is. One that is made
                for another number of updates than the training makes is warned of.
            kwargs: As for ``accelerator.prepare``.

        Returns:
            The prepared objects in the same order. The ``len`` of the train dataloader is an unpruned epoch's
            until its first walk, for scripts that size their schedules by it, and the pass's from then on.

        Raises:
            ValueError: If the train dataloader is not among the objects.
        """
        if not any(each is self._dataloader for each in objects):
            raise ValueError(
                "infobatch.prepare() was not given the train dataloader that this AcceleratedInfoBatch was made with: "
                "give it that very object, with the model, the optimizer and the scheduler"
            )
        given = [self._rebuilt if each is self._dataloader else each for each in objects]
        prepared = self._accelerator.prepare(*given, **kwargs)
        prepared = list(prepared) if len(objects) > 1 else [prepared]
        for i, (each, result) in enumerate(zip(objects, prepared, strict=True)):
            if each is self._dataloader:
                prepared[i] = self._pruned_loader(result)
            elif steps_by_update(result) and not self._pruner.keeps_order:
                prepared[i] = self._pass_scheduler(result)
        return tuple(prepared) if len(prepared) > 1 else prepared[0]

    def weigh(
        self,
        losses: Tensor,
        scores: Tensor | None = None,
        log_snr: Tensor | None = None,
        outputs: Tensor | None = None,
    ) -> Tensor:
        """Weigh the losses of the batch in hand, the one that the loader gave last, and record them as scores.

        Waits neither for a device nor for other processes.

        Args:
            losses (Tensor): Losses of this process's batch, shape ``(B, ...)``, any float dtype: per sample or per
                element, e.g. from ``F.mse_loss(..., reduction='none')``; averaged over all but the first dimension.
                Left untouched.
            scores (Tensor, optional): What to rank the samples by in place of the losses, of the same kind: e.g.
                the losses before Min-SNR weighting. Not recorded where the loss is NaN or infinite. Defaults to the
                losses.
            log_snr (Tensor, optional): Natural logarithm of the signal-to-noise ratio of each sample's noise level,
                shape ``(B,)``, as :func:`.log_snr` has it of a scheduler of diffusers; needed for ``score='timestep'``,
                not looked at otherwise.
            outputs (Tensor, optional): What the losses were computed from, such as a model's prediction, shape
                ``(B, ...)``, for ``score='gradient'``, which goes by the gradient there unless :meth:`observe` was
                given a layer, or ``scores`` are given; not looked at otherwise.

        Returns:
            Tensor: Scalar ``mean(weight * loss)``, float32, for ``accelerator.backward``. A second call for the same
            batch weighs its losses and records nothing.

        Raises:
            ValueError: If no batch is in hand, the shapes do not fit it, or ``log_snr`` is needed and missing.
        """
        batch = self._walk.in_hand
        if batch is None:
            raise ValueError("no batch is in hand: walk the loader that infobatch.prepare() returned, then weigh")
        per_sample = batch.per_sample(losses, "losses")
        ranked = per_sample if scores is None else ranked_by(per_sample, batch.per_sample(scores, "scores"))
        self._last = batch, per_sample.detach()
        weighted = batch.weighted(per_sample)
        if (rule := self._pruner.store.rule).takes_norms:
            layer, outputs = (None, None) if scores is not None else (self._layer, outputs)
            norms = norms_to_come(rule, layer, per_sample, outputs)
            factors = batch.weights / len(per_sample)
            if norms is not None and not per_sample.requires_grad:
                return weighted  # a look: the norms come with the backward pass of another call
            ranked = ranked.clamp(min=0) if norms is None else norms.expect(per_sample, factors, weighted)
        self._walk.take(batch, ranked, log_snr)
        return weighted

    @property
    def index(self) -> Tensor:
        """Sample indices of the batch in hand, shape ``(B,)``, int64, on the accelerator's device."""
        if self._walk.in_hand is None:
            raise ValueError("no batch is in hand: infobatch.index is that of the batch that the loader gave last")
        return self._walk.in_hand.index

    @property
    def loss(self) -> Tensor:
        """Mean loss of the batch weighed last on this process, ``sum(w * l) / sum(w)``, for the log: a scalar, float32.

        An estimate of what the unpruned run would log: the plain mean is over the samples that were kept, which are
        harder. In passes that are not pruned it is the plain mean.

        Raises:
            ValueError: If no batch was weighed yet.
        """
        if self._last is None:
            raise ValueError(
                "no batch was weighed yet: call infobatch.weigh() first, infobatch.loss is that of the last batch"
            )
        batch, losses = self._last
        return batch.mean(losses)

    def merge(self, timeout_s: float = PATIENCE_S) -> None:
        """Exchange the scores of this pass among the processes; all of them must call it before ``save_state``.

        It may be called at any step, any number of times; in one process it only ends a pass that is over.

        Args:
            timeout_s (float): Seconds to wait for the other processes. Defaults to 60.

        Raises:
            ValueError: If they have not come by then, as where it is called on the main process alone.
        """
        self._walk.merge(timeout_s)

    # ---- what is wired ------------------------------------------------------------------------------

    def _pruned_loader(self, prepared: DataLoader) -> PrunedLoader:
        walk = self._walk
        return PrunedLoader(
            lambda: walk.walk(prepared), lambda: walk.length, self._dataloader, self._geometry.batch_size
        )

    def _pass_scheduler(self, prepared: AcceleratedScheduler) -> PassScheduler:
        own_steps = self._own_steps["pass_steps"]
        scheduler = PassScheduler(prepared, self._steps_due, lambda: self._walk.updates_done, own_steps)
        line = length_line(prepared.scheduler, self._schedule, self._per_update, self._accumulated)
        if line is not None and self._accelerator.is_main_process:
            warnings.warn(line, stacklevel=3)
        self._schedulers.append(scheduler)
        return scheduler

    def _steps_due(self) -> int:
        """Scheduler steps that the unpruned run would have taken by now."""
        due = steps_due(self._walk, self._pruner, self._accumulated)
        return due * self._per_update

    def _check_schedulers(self) -> None:
        """Say so if a schedule is left to count updates, of which there are fewer."""
        if not self._pruner.keeps_order:
            warn_of_others(self._accelerator, self._schedulers)

    @property
    def _in_hand(self) -> Batch | None:
        return self._walk.in_hand
