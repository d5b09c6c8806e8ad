"""Pruned training in an accelerate script."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import pickle
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from ..core import EpochSchedule, NoPruning, Pruner, PruningPolicy, build_policy
from ..core.checks import whole_number
from ..core.distributed import gather, require_equal, world_size
from ..core.pruner import damaged
from ..core.scores import is_number
from ..core.summary import check_summary, write_scores, write_summary
from .loader import LoaderGeometry
from .lr import PassScheduler


class AcceleratedInfoBatch:
    """InfoBatch for a training script on accelerate, such as diffusers' examples.

    Its :meth:`prepare` takes the place of ``accelerator.prepare``; the batches stay what they were, the losses go
    through :meth:`weigh`. accelerate shares the data out among its processes as it does without us, whatever its
    ``split_batches``, ``dispatch_batches``, ``even_batches`` and gradient accumulation. The state is saved and loaded
    by ``accelerator.save_state`` and ``load_state``.

    Args:
        accelerator (Accelerator): The run's.
        dataloader (DataLoader): The training data, before it is prepared: a map-style data set, a batch size,
            ``shuffle=True`` or ``False``.
        num_epochs (int): Passes over the data in the whole training, at least 1.
        prune_ratio (float): Chance r that a well-learned sample is skipped, in [0, 1). Defaults to 0.5.
        delta (float): Share of the training after which every sample is visited, in (0, 1]. Defaults to 0.875.
        policy (str | dict | PruningPolicy): ``'infobatch'``, ``'random'``, a registered policy of your own by its name
            or as ``dict(type=name, ...)``, or an instance; ``'none'`` keeps the loader's own sampler and order, records
            scores and weighs nothing. Defaults to ``'infobatch'``.
        seed (int): Seed of the draws, the same on every process. Defaults to 0.
        item_seed (bool): Whether items are read under a seed made of seed, pass and position, so that augmentations
            repeat after a resume. Defaults to False.
        score (str, optional): What samples are ranked by: ``'raw'``, their last loss, as in the paper; ``'ema'``, the
            average over their visits; ``'timestep'``, that of losses over the mean loss at their noise level, which
            needs the ``log_snr`` of :meth:`weigh`: a denoising loss depends on its random timestep first of all. See
            :class:`.ScoreStore`. Defaults to ``'raw'``, or ``'ema'`` where ``score_ema`` is given.
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
        >>> for epoch in range(infobatch.passes_done, 100):
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
        num_epochs: int,
        prune_ratio: float = 0.5,
        delta: float = 0.875,
        *,
        policy: str | Mapping[str, Any] | PruningPolicy = "infobatch",
        seed: int = 0,
        item_seed: bool = False,
        score: str | None = None,
        score_ema: float | None = None,
        fingerprint: str = "",
    ) -> None:
        _check_accelerator(accelerator)
        num_epochs = whole_number("num_epochs", num_epochs, 1, "the training needs at least one pass over the data")
        seed = whole_number("seed", seed, 0, "use 0 or a positive number")
        chosen = build_policy(policy, prune_ratio, delta)
        if getattr(dataloader, "_is_accelerate_prepared", False):
            raise ValueError(
                "the train dataloader is prepared already: give it to AcceleratedInfoBatch as it was before "
                "accelerator.prepare, and call infobatch.prepare in its place"
            )
        self._geometry = LoaderGeometry(accelerator, dataloader)
        num_samples = len(dataloader.dataset)  # type: ignore[arg-type]
        self._keeps_order = isinstance(chosen, NoPruning)
        if self._geometry.batch_size > num_samples and not self._keeps_order:
            raise ValueError(
                f"one global batch holds {self._geometry.batch_size} samples but the data set only {num_samples}: "
                "there is nothing to prune within a pass; use a smaller batch size"
            )
        self._accelerator = accelerator
        self._pass_updates = math.ceil(self._geometry.epoch_batches / accelerator.gradient_accumulation_steps)
        schedule = EpochSchedule(
            num_samples, num_epochs, self._geometry.batch_size, self._geometry.epoch_batches, self._pass_updates
        )
        self._pruner = Pruner(schedule, chosen, seed, self._geometry.shuffle, fingerprint, item_seed, score_ema, score)
        require_equal(
            num_samples=num_samples,
            num_epochs=num_epochs,
            **chosen.settings(),
            seed=seed,
            item_seed=item_seed,
            score=self._pruner.store.score,
            score_ema=self._pruner.store.score_ema,
            fingerprint=fingerprint,
        )
        self._dataloader = dataloader
        self._rebuilt = self._geometry.rebuilt(dataloader, self._pruner, self._keeps_order)
        self._schedulers: list[PassScheduler] = []
        self._walks = 0
        self._touched = False  # whether anything was weighed in the walk in hand
        self._begun: tuple[int, int] | None = None  # pass and position where it began
        self._in_hand: _Batch | None = None
        self._late: list[tuple[_Batch, Tensor, Tensor | None]] = []
        self._loss: Tensor | None = None
        self._iterations = 0
        self._updates_done = 0
        self._nonfinite_known = 0
        self._time_before = 0.0
        self._started = time.perf_counter()
        for earlier in [each for each in accelerator._custom_objects if isinstance(each, AcceleratedInfoBatch)]:
            if _alike(earlier._dataloader.dataset, dataloader.dataset):
                earlier._detach()  # of an attempt with another batch size, as find_executable_batch_size makes
        accelerator.register_for_checkpointing(self)
        self._hooks = [
            accelerator.register_load_state_pre_hook(self._check_checkpoint),
            accelerator.register_save_state_pre_hook(self._check_merged),
        ]

    # ---- what the script calls ---------------------------------------------------------------------

    def prepare(self, *objects: Any, **kwargs: Any) -> Any:
        """``accelerator.prepare``, with the training data pruned and the schedulers following the progress.

        Args:
            objects: As for ``accelerator.prepare``; the train dataloader must be one of them. Learning-rate
                schedulers then step by progress: a pruned pass takes them as far as a full one. One that is stepped
                once per epoch is ``accelerator.prepare``'s; ``ReduceLROnPlateau`` is left as it is.
            kwargs: As for ``accelerator.prepare``.

        Returns:
            The prepared objects in the same order. The ``len`` of the train dataloader is that of an unpruned epoch
            until its first walk, for scripts that size their schedules by it, then that of the pass.

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
                prepared[i] = PrunedLoader(self, result, self._dataloader)
            elif _steps_by_update(result) and not self._keeps_order:
                prepared[i] = PassScheduler(result, self._steps_due, lambda: self._updates_done, self._pass_updates)
                self._schedulers.append(prepared[i])
        return tuple(prepared) if len(prepared) > 1 else prepared[0]

    def weigh(self, losses: Tensor, scores: Tensor | None = None, log_snr: Tensor | None = None) -> Tensor:
        """Weigh the losses of the batch in hand, the one that the loader gave last, and record them as scores.

        Waits neither for a device nor for other processes.

        Args:
            losses (Tensor): Losses of this process's batch, shape ``(B, ...)``, any float dtype: per sample or per
                element, e.g. from ``F.mse_loss(..., reduction='none')``; averaged over all but the first dimension.
                Left untouched.
            scores (Tensor, optional): What to rank the samples by in place of the losses, of the same kind: e.g.
                the losses before Min-SNR weighting. Defaults to the losses.
            log_snr (Tensor, optional): Natural logarithm of the signal-to-noise ratio of each sample's noise level,
                shape ``(B,)``, as :func:`.log_snr` has it of a scheduler of diffusers; needed for ``score='timestep'``,
                not looked at otherwise.

        Returns:
            Tensor: Scalar ``mean(weight * loss)``, float32, for ``accelerator.backward``. A second call for the same
            batch weighs its losses and records nothing.

        Raises:
            ValueError: If no batch is in hand, the shapes do not fit it, or ``log_snr`` is needed and missing.
        """
        batch = self._in_hand
        if batch is None:
            raise ValueError("no batch is in hand: walk the loader that infobatch.prepare() returned, then weigh")
        per_sample = batch.per_sample(losses, "losses")
        ranked = per_sample if scores is None else batch.per_sample(scores, "scores")
        self._loss = per_sample.detach().mean()
        weighted = per_sample.mean() if batch.weights is None else (batch.weights * per_sample).mean()
        if not batch.is_weighed:
            batch.is_weighed = True
            self._iterations += 1
            self._updates_done += self._accelerator.sync_gradients
            if batch.is_settled:
                self._late.append((batch, ranked.detach(), log_snr))
            else:
                self._pruner.record(batch.index, ranked, log_snr=log_snr)
                self._touched = True
                self._advance()
        return weighted

    @property
    def index(self) -> Tensor:
        """Sample indices of the batch in hand, shape ``(B,)``, int64, on the accelerator's device."""
        if self._in_hand is None:
            raise ValueError("no batch is in hand: infobatch.index is that of the batch that the loader gave last")
        return self._in_hand.index

    @property
    def loss(self) -> Tensor:
        """Mean loss of the batch weighed last on this process, without weights: the unpruned run's, for the log."""
        if self._loss is None:
            raise ValueError(
                "no batch was weighed yet: call infobatch.weigh() first, infobatch.loss is that of the last batch"
            )
        return self._loss

    @property
    def passes_done(self) -> int:
        """Passes that are done; where a script's loop over epochs goes on after a resume."""
        return self._pruner.pass_index + self._is_pass_over

    @property
    def updates_done(self) -> int:
        """Optimiser steps made so far, with the accelerator's gradient accumulation."""
        return self._updates_done

    @property
    def updates_expected(self) -> int:
        """Optimiser steps of the whole training: those of passes to come as far as the last pruned one tells.

        For a progress bar's remaining time. Exact from the last pruned pass on.
        """
        pruner, schedule = self._pruner, self._pruner.schedule
        kept = [entry["kept_ratio"] for entry in pruner.history if self._prunes(entry["pass"])]
        ratio = kept[-1] if kept else 1.0
        whole = schedule.full_visits(0)
        total, accumulated = self._updates_done, self._accelerator.gradient_accumulation_steps
        is_begun = not pruner.finished and (pruner.plan is not None or pruner.visited > 0)
        if is_begun and not self._is_pass_over:
            total += math.ceil(self._batches / accumulated) - self._batches_done // accumulated
        if pruner.plan is not None and pruner.plan.pruned:
            ratio = len(pruner.plan) / whole
        for coming in range(pruner.pass_index + is_begun, schedule.num_passes):
            total += self._updates(round(whole * ratio) if self._prunes(coming) else whole)
        return total

    def merge(self) -> None:
        """Exchange the scores of this pass among the processes; all of them must call it before ``save_state``.

        It may be called at any step, any number of times; in one process it does nothing.
        """
        if self._is_pass_over:
            self._finish_pass()
        self._settle_late()
        self._pruner.merge()

    def logs(self) -> dict[str, float]:
        """Scalars of the last finished pass, for ``accelerator.log``; empty before there is one."""
        return self._pruner.scalars()

    def summary(self) -> dict[str, Any]:
        """Policy, passes, visits, saved share, iterations, time and one entry per pass, as plain numbers."""
        return self._pruner.summary(
            iterations=self._iterations,
            iterations_full=self._pruner.schedule.num_passes * self._geometry.epoch_batches,
            wall_time_s=round(self._wall_time(), 3),
        )

    def write(self, output_dir: str | os.PathLike[str], names: Sequence[str] | None = None) -> None:
        """Write ``infobatch_summary.json`` and ``infobatch_scores.npz``, on the main process.

        Args:
            output_dir (str | PathLike): Where to; made if it is not there.
            names (Sequence[str], optional): Names of the samples, for the scores.
        """
        if not self._accelerator.is_main_process:
            return
        try:
            os.makedirs(output_dir, exist_ok=True)
            write_summary(str(output_dir), self.summary())
            write_scores(str(output_dir), self._pruner.store, names)
        except OSError as error:  # a full disk must not end a training
            warnings.warn(f"InfoBatch could not write to {output_dir}: {error}", stacklevel=2)

    def check_output(self, output_dir: str | os.PathLike[str]) -> None:
        """Refuse to resume into a directory whose summary belongs to a run of other settings.

        Raises:
            ValueError: With both values and the file.
        """
        check_summary(str(output_dir), self._pruner.summary())

    # ---- what accelerate calls ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, as ``accelerator.save_state`` asks for it; plain tensors and numbers."""
        return {
            **self._pruner.state_dict(),
            "num_epochs": self._pruner.schedule.num_passes,
            "iterations": self._iterations,
            "updates": self._updates_done,
            "wall_time_s": self._wall_time(),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a state of another run; see :meth:`load_state_dict`."""
        self._pruner.check_state(state)
        for key in ("num_epochs", "iterations", "updates", "wall_time_s"):
            if not is_number(state.get(key)) or state[key] < 0:
                raise damaged(key)
        epochs = self._pruner.schedule.num_passes
        if state["num_epochs"] != epochs:
            raise ValueError(
                f"cannot resume: the checkpoint is of a training of {state['num_epochs']} epochs, this one has "
                f"{epochs}; annealing and learning rate go by their number: use the same"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the next unvisited position of the same plan, as ``accelerator.load_state`` asks for it.

        Raises:
            ValueError: With both values, if the state is of another data set, policy or length of training, of a
                newer version, or damaged.
        """
        self.check_state(state)
        self._pruner.load_state_dict(state)
        schedule = self._pruner.schedule
        assert isinstance(schedule, EpochSchedule)
        for each in self._schedulers:
            each.forget()
        if all(each.follows_its_arguments for each in self._schedulers):
            schedule.pass_steps = self._pass_updates
        self._iterations = int(state["iterations"])
        self._updates_done = int(state["updates"])
        self._nonfinite_known = self._pruner.store.num_nonfinite
        self._time_before = float(state["wall_time_s"])
        self._started = time.perf_counter()
        self._in_hand, self._touched, self._late, self._begun = None, False, [], None

    def _check_checkpoint(self, models: Any, input_dir: str) -> None:
        """Refuse a checkpoint that this run cannot go on from before accelerate loads half of it."""
        objects = self._accelerator._custom_objects  # saved under their numbers
        path = Path(input_dir, f"custom_checkpoint_{objects.index(self)}.pkl")
        state: Mapping[str, Any] = {}
        with contextlib.suppress(OSError, pickle.UnpicklingError):  # no file, or another object's
            state = torch.load(path, map_location="cpu", weights_only=True)
        if "pass_index" not in state:
            raise ValueError(
                f"cannot resume: the checkpoint {input_dir} was saved without InfoBatch; finish that run without it, "
                "or start a new one from its weights"
            )
        self.check_state(state)

    def _detach(self) -> None:
        """Have the accelerator forget this object."""
        self._accelerator._custom_objects.remove(self)
        for hook in self._hooks:
            hook.remove()

    def _check_merged(self, models: Any, weights: Any, output_dir: str) -> None:
        self._pruner.store.flush()
        if self._pruner.store.unmerged:
            warnings.warn(
                "the scores of the other processes are not in this checkpoint: call infobatch.merge() on every process "
                "before accelerator.save_state()",
                stacklevel=2,
            )

    # ---- passes ------------------------------------------------------------------------------------

    def _walk(self, prepared: DataLoader) -> Iterator[Any]:
        """Walk a new pass; the rest of the pass in hand after a resume, or if nothing was weighed of it so far."""
        if self._touched or self._is_pass_over:
            self._finish_pass()  # it was broken off, or a state was saved at its very end
        if not self._walks:
            self._check_schedulers()
        if self._pruner.finished:
            epochs = self._pruner.schedule.num_passes
            warnings.warn(
                f"pass {self._pruner.pass_index + 1} of a training of {epochs} epochs, which is done: let the script's "
                f"loop be `for epoch in range(infobatch.passes_done, {epochs})`",
                stacklevel=3,
            )
        self._walks += 1
        walk, self._in_hand = self._walks, None
        if not self._keeps_order:
            self._pruner.begin_pass()
        self._settle_late()  # only now: on no process may they change the plan
        current = self._pruner.pass_index
        if self._begun is not None and self._begun[0] == current:  # of the walk before nothing was weighed
            self._pruner.visited, self._pruner.own_skipped = self._begun[1], 0
        start = self._pruner.visited
        self._begun = (current, start)
        done = self._batches_done
        # A host's own order begins anew, or where its seedable sampler was, and is skipped through.
        prepared.set_epoch(self._pruner.pass_index)  # type: ignore[attr-defined]
        loader = skip_first_batches(prepared, done) if done and self._keeps_order else prepared
        loader.iteration = self._pruner.pass_index  # type: ignore[attr-defined]
        batches = iter(loader)
        with _draws_nothing(loader) if done else contextlib.nullcontext():
            first = next(batches, None)
        plan = self._pruner.plan
        if plan is not None and plan.pruned:
            loader.remainder = -1  # every batch is full; accelerate takes it from the size of the data set
        for index, batch in itertools.chain([] if first is None else [first], batches):
            self._settle()
            weights = None if self._keeps_order else self._pruner.weights(index)
            self._in_hand = _Batch(index, weights, self._pruner.pass_index)
            yield batch
            if walk != self._walks:
                raise ValueError(
                    "the train dataloader is walked by two iterators at once: another one began a pass in the midst of "
                    "this one; let one walk end before the next begins"
                )
        self._settle()
        if self._pruner.pass_index != current:
            return  # merge() has ended it with its last batch
        # Where some processes have no last batch, the others still train on theirs: they meet at the next walk.
        meets = not self._geometry.ragged or (plan is not None and plan.pruned)
        if any(gather(self._touched)) if meets else self._touched or first is None:
            self._pruner.visited = self._visits  # also where the last batch was the other processes'
            if meets:
                self._finish_pass()
        else:  # a walk of which nothing is weighed counts for nothing
            self._pruner.visited, self._pruner.own_skipped = start, 0

    def _settle(self) -> None:
        """Count the visits of a batch that was handed out and not weighed, as after a loss that is NaN."""
        batch = self._in_hand
        if batch is None or batch.is_weighed or batch.is_settled:
            return
        batch.is_settled = True
        self._pruner.own_skipped += len(batch.index)
        self._advance()

    def _settle_late(self) -> None:
        """Take down what was weighed after its pass had ended, as loops do that fetch one batch ahead."""
        late, self._late = self._late, []
        for batch, ranked, log_snr in late:
            self._pruner.record(batch.index, ranked, log_snr=log_snr)
            self._pruner.correct(batch.pass_index, len(batch.index))

    def _check_schedulers(self) -> None:
        """Say so if a schedule is left to count updates, of which there are fewer."""
        ours = {id(each.prepared) for each in self._schedulers}
        apart = [each for each in self._accelerator._schedulers if id(each) not in ours and _steps_by_update(each)]
        if apart and not self._keeps_order:
            warnings.warn(
                f"a {type(apart[0].scheduler).__name__} was not given to infobatch.prepare(): if it is stepped with "
                "every update, it will not reach its end, for a pruned training makes fewer of them",
                stacklevel=3,
            )

    def _length(self) -> int:
        return self._batches if self._walks else self._geometry.epoch_batches

    @property
    def _batches(self) -> int:
        """Steps of the current pass."""
        return self._geometry.epoch_batches if self._keeps_order else self._pruner.batches

    @property
    def _visits(self) -> int:
        """Visits of the current pass, over all processes."""
        plan = self._pruner.plan
        return self._pruner.schedule.num_samples if plan is None else len(plan)

    @property
    def _batches_done(self) -> int:
        return math.ceil(self._pruner.visited / self._geometry.batch_size)

    @property
    def _is_pass_over(self) -> bool:
        return self._pruner.visited > 0 and self._batches_done >= self._batches

    def _advance(self) -> None:
        """Move on by the batch in hand, of all processes."""
        self._pruner.advance(min(self._geometry.batch_size, self._visits - self._pruner.visited))

    def _finish_pass(self) -> None:
        """End the pass, and say so if some of it gave no scores; every process must call it."""
        self._touched = False
        entry = self._pruner.finish_pass()
        found = self._pruner.store.num_nonfinite
        fresh, self._nonfinite_known = found - self._nonfinite_known, found
        if not self._accelerator.is_main_process:
            return
        if fresh:
            warnings.warn(
                f"{fresh} visits of pass {self._pruner.pass_index} had a loss, or a noise level, "
                "that is not finite: they are no scores, and samples without one are never pruned",
                stacklevel=4,
            )
        if entry["skipped"]:
            warnings.warn(
                f"{entry['skipped']} visits of pass {self._pruner.pass_index} were handed out and not weighed: call "
                "infobatch.weigh() for every batch; after a resume skip none, the loader goes on where the checkpoint "
                "was saved",
                stacklevel=4,
            )

    def _prunes(self, pass_index: int) -> bool:
        return self._pruner.policy.is_active(self._pruner.schedule.progress(pass_index))

    def _updates(self, visits: int) -> int:
        batches = math.ceil(visits / self._geometry.batch_size)
        return math.ceil(batches / self._accelerator.gradient_accumulation_steps)

    def _steps_due(self) -> int:
        """Scheduler steps that the unpruned run would have taken by now."""
        pruner, schedule = self._pruner, self._pruner.schedule
        if pruner.visited:
            updates = math.ceil(self._batches / self._accelerator.gradient_accumulation_steps)
            due = schedule.steps_at(pruner.pass_index, self._updates(pruner.visited), updates)
        else:
            due = schedule.steps_before(pruner.pass_index)
        # accelerate makes one step per process at each update, unless batches are split among them: as many here,
        # so that the learning rates are the same on any number of processes.
        return due * (1 if self._accelerator.split_batches else self._accelerator.num_processes)

    def _wall_time(self) -> float:
        return self._time_before + time.perf_counter() - self._started


class PrunedLoader:
    """The prepared train dataloader: each walk is one pass, or the rest of it, of the user's own batches.

    Attributes:
        dataset: The user's data set.
    """

    def __init__(self, infobatch: AcceleratedInfoBatch, prepared: DataLoader, dataloader: DataLoader) -> None:
        self._infobatch = infobatch
        self._prepared = prepared
        self.dataset = dataloader.dataset
        self.batch_size = dataloader.batch_size
        self.num_workers = dataloader.num_workers

    def __iter__(self) -> Iterator[Any]:
        return self._infobatch._walk(self._prepared)

    def __len__(self) -> int:
        return self._infobatch._length()

    @property
    def total_batch_size(self) -> int:
        """Samples in a batch of all processes."""
        return self._infobatch._geometry.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the pass is known. Present because scripts call it."""

    @property
    def sampler(self) -> Any:
        """Asked for by ``accelerator.skip_first_batches``, which has nothing to do here."""
        raise AttributeError(
            "the loader of infobatch.prepare() goes on by itself where a resumed run was: leave out skip_first_batches"
        )


@dataclass
class _Batch:
    """The batch in hand: indices, shape ``(B,)``; weights, shape ``(B,)``, None for ones; its pass."""

    index: Tensor
    weights: Tensor | None
    pass_index: int
    is_weighed: bool = False
    is_settled: bool = False

    def per_sample(self, values: Tensor, name: str) -> Tensor:
        """One float32 value for each sample."""
        if values.dim() == 0 or len(values) != len(self.index):
            raise ValueError(
                f"weigh() needs {name} of {len(self.index)} samples, shape ({len(self.index)}, ...), but got shape "
                f"{tuple(values.shape)}: use reduction='none', and hand over the losses of the whole batch"
            )
        return values.float().flatten(1).mean(1) if values.dim() > 1 else values.float()


def _check_accelerator(accelerator: Accelerator) -> None:
    if not isinstance(accelerator, Accelerator):
        raise ValueError(
            f"AcceleratedInfoBatch needs the run's Accelerator, got {type(accelerator).__name__}; without accelerate "
            "use infobatch_mm.InfoBatch"
        )
    if accelerator.use_stateful_dataloader:
        raise ValueError(
            "use_stateful_dataloader=True: the loader would resume where it was, and InfoBatch, which saves the "
            "position of each pass itself, a second time; leave it out of DataLoaderConfiguration"
        )
    if accelerator.gradient_accumulation_steps > 1 and not accelerator.gradient_state.sync_with_dataloader:
        raise ValueError(
            "sync_with_dataloader=False: gradients would be accumulated across the ends of passes, of which learning "
            "rates by progress know nothing; leave it out of GradientAccumulationPlugin"
        )
    mesh = getattr(accelerator, "torch_device_mesh", None)
    shared = [name for name in (mesh.mesh_dim_names or () if mesh else ()) if name in ("tp", "cp", "sp")]
    if shared:
        raise ValueError(
            f"the accelerator's device mesh has a dimension {shared[0]!r}, in which processes see the same samples: "
            "pruning needs data parallelism alone"
        )
    if accelerator.num_processes != world_size():
        raise ValueError(
            f"accelerate shares the data among {accelerator.num_processes} processes, torch.distributed knows "
            f"{world_size()}: pruning needs data parallelism alone, with the process group of the Accelerator"
        )


def _alike(one: Any, other: Any) -> bool:
    """Whether two data sets may be one that was made twice."""
    return one is other or (type(one) is type(other) and len(one) == len(other))


def _steps_by_update(scheduler: Any) -> bool:
    """Whether it is a prepared schedule of updates: not one of validations, nor one that another engine steps."""
    return type(scheduler) is AcceleratedScheduler and not isinstance(scheduler.scheduler, ReduceLROnPlateau)


@contextlib.contextmanager
def _draws_nothing(loader: DataLoader) -> Iterator[None]:
    """Have a loader seed its workers from a generator of its own, so that resuming leaves the global one in place."""
    base = getattr(loader, "base_dataloader", loader)
    own, base.generator = base.generator, torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    try:
        yield
    finally:
        base.generator = own
