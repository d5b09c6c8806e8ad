"""The one line: a hook that wires pruning into a run of MMEngine's Runner."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_dist_info, master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmengine.utils import apply_to
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..core import EpochSchedule, IterSchedule, NoPruning, Pruner, PruningPolicy, Schedule, build_policy, rng
from ..core.devices import moved
from ..core.distributed import require_equal
from ..core.scores import check_score_ema
from ..core.summary import check_summary, write_scores, write_summary
from ..losses import AttachedViews, LossWeigher, attach_views
from . import process_state
from .checkpoints import CheckpointGuard, check_resume_point, check_state
from .loader import BatchIndices, IndexedLoader, sample_name
from .loops import InfoBatchEpochLoop, InfoBatchIterLoop
from .param_schedule import SchedulerPacer, renew_max_iters
from .samplers import InfoBatchSampler, as_dict, given, host_sampler, pass_loader, run_seed

#: Key of our state in a checkpoint.
STATE_KEY = "infobatch"

# A fingerprint looks at this many names, evenly spread: enough to tell data sets of equal length apart.
_FINGERPRINT_NAMES = 256


@HOOKS.register_module()
class InfoBatchHook(Hook):
    """Trains on fewer samples: prunes well-learned ones in each pass, without bias.

    Add it to ``custom_hooks``; it wires sample indices, the sampler, the loop, the per-sample losses, the
    learning-rate schedule, logging and checkpoints of this run, and undoes it afterwards. Method:
    InfoBatch (Qin et al., ICLR 2024).

    Args:
        prune_ratio (float, optional): Chance r that a well-learned sample is skipped, in [0, 1).
            Defaults to 0.5, or to what a configured ``InfoBatchSampler`` says.
        delta (float, optional): Share of the training after which every sample is visited, in (0, 1].
            Defaults to 0.875, or as above.
        policy (str | dict | PruningPolicy, optional): ``'infobatch'``, ``'random'``, a registered policy of your own by
            its name or as ``dict(type=name, ...)`` with its arguments, or an instance; ``'none'`` keeps the host's own
            sampler, iterator and order and only records scores. Defaults to ``'infobatch'``, or as above.
        seed (int, optional): Seed of the draws. Defaults to the runner's.
        score_auxiliary (bool): Whether auxiliary heads count in a sample's score. They are weighed in any
            case. Defaults to False.
        item_seed (bool): Whether every item is read under a seed of its own, made of the run's seed, pass and
            position in the pass, so that augmentations repeat after a resume also in worker processes. The
            host's random streams are then not those of the unpruned run. Defaults to False.
        score_ema (float): Decay of the average over a sample's visits that is its score, in [0, 1); for losses that
            depend on a random mask or crop, with any policy; see :class:`.ScoreStore`. Defaults to 0: the last
            loss, as in the paper.

    Raises:
        ValueError: Before training starts, for arguments out of range and for configs that cannot be
            followed: see the table in the documentation.

    Example:
        >>> custom_imports = dict(imports=['infobatch_mm.engine'], allow_failed_imports=False)
        >>> custom_hooks = [dict(type='InfoBatchHook', prune_ratio=0.5, delta=0.875)]
    """

    # After EMAHook, whose copy of the model is then a clean one, and before the scheduler and checkpoint
    # hooks, which need the position that this hook counts.
    priority = "BELOW_NORMAL"

    def __init__(
        self,
        prune_ratio: float | None = None,
        delta: float | None = None,
        policy: str | Mapping[str, Any] | PruningPolicy | None = None,
        seed: int | None = None,
        *,
        score_auxiliary: bool = False,
        item_seed: bool = False,
        score_ema: float = 0.0,
    ) -> None:
        check_score_ema(score_ema)
        self._given = given(prune_ratio=prune_ratio, delta=delta, policy=policy)
        build_policy(**self._given)
        self._seed = seed
        self._score_auxiliary = score_auxiliary
        self._item_seed = item_seed
        self._score_ema = score_ema
        self._pruner: Pruner | None = None
        self._weigher = LossWeigher()
        self._views: AttachedViews | None = None
        self._views_due = False
        self._num_repeats = 1
        self._pacer: SchedulerPacer | None = None
        self._batch: BatchIndices
        self._updates_before: list[int] = []
        self._undo: list[Callable[[], None]] = []
        self._state: dict[str, Any] | None = None
        self._rng_before_val: dict[str, Any] | None = None
        self._process_state: dict[str, Any] | None = None
        self._over = False
        self._warned_nothing_pruned = False
        self._started = time.perf_counter()
        self._time_before = 0.0

    # ---- wiring -----------------------------------------------------------------------------------

    def before_run(self, runner: Any) -> None:
        """Wire this run; does nothing for validation and testing."""
        loop = getattr(runner, "_train_loop", None)
        if not isinstance(loop, BaseLoop) or self._over or self._pruner is not None:
            return  # no training, or after it, or one that was interrupted and goes on
        if sum(isinstance(hook, InfoBatchHook) for hook in runner.hooks) > 1:
            raise ValueError("this config has more than one InfoBatchHook: keep one in custom_hooks")
        try:
            self._wire(runner, loop)
        except Exception:
            self._unwire()
            raise

    def _wire(self, runner: Any, loop: BaseLoop) -> None:
        check_runner(runner)
        check_resume_point(runner)
        policy = build_policy(**self._settings(loop.dataloader))
        if len(loop.dataloader.dataset) == 0:
            raise ValueError("the training data set is empty: check data_root and data_prefix of the train_dataloader")

        self._views = attach_views(process_state.bare_model(runner), self._weigher, self._score_auxiliary)
        self._undo.append(self._views.restore)
        self._tell_what_is_not_separable(runner, policy)
        if isinstance(policy, NoPruning):
            loader = self._watch(loop)
        else:
            loop, loader = self._take_over(runner, loop)
        dataset = loader.dataset
        sampler = loader.sampler
        seed = self._seed
        if seed is None:
            seed = sampler.seed if isinstance(sampler, InfoBatchSampler) else run_seed(runner)
        shuffle = getattr(sampler, "shuffle", True)
        schedule = self._schedule(loop, loader)
        self._pruner = Pruner(schedule, policy, seed, shuffle, fingerprint(dataset), self._item_seed, self._score_ema)
        self._num_repeats = getattr(sampler, "repeats", 1)
        require_equal(
            num_samples=schedule.num_samples,
            sample_names=self._pruner.fingerprint,
            batch_size=schedule.batch_size,
            seed=seed,
            num_repeats=self._num_repeats,
            score_ema=self._score_ema,
            **policy.settings(),
            **schedule.settings(),
        )
        if isinstance(sampler, InfoBatchSampler):
            sampler.bind(self._pruner)
            loop.pruner = self._pruner
            self._pacer = SchedulerPacer(runner, self._steps_due)
            self._undo.append(self._pacer.restore)
            self._keep_validation_aside(runner)
        self._undo.append(CheckpointGuard(runner, partial(self._exchanged, runner)).restore)
        if runner._resume:
            check_summary(runner.work_dir, self._pruner.summary())
        settings = ", ".join(f"{key} {value}" for key, value in policy.settings().items())
        runner.logger.info(f"InfoBatch: {settings}, {schedule.num_samples} samples")
        if self._weigher.mixes:
            runner.logger.info(
                "InfoBatch: images are mixed; scores are their losses above the least that targets allow"
            )
        delta, last = policy.settings().get("delta", 1), schedule.progress(schedule.num_passes - 1)
        if delta < 1 and policy.is_active(last):
            runner.logger.warning(
                f"InfoBatch: no pass starts after delta={delta} of {schedule.num_passes} passes, so none visits every "
                f"sample at the end; use delta={math.floor(100 * last) / 100} for one that does"
            )

    def _tell_what_is_not_separable(self, runner: Any, policy: PruningPolicy) -> None:
        assert self._views is not None
        if self._views.not_separable and not isinstance(policy, NoPruning):
            runner.logger.info(
                "InfoBatch: these losses do not separate over samples; in pruned passes the mean of the samples' own "
                f"losses is optimised in their place, which is not unbiased: {', '.join(self._views.not_separable)}"
            )

    def _settings(self, dataloader: DataLoader) -> dict[str, Any]:
        """The hook's arguments and those of a configured ``InfoBatchSampler``; they must not differ."""
        settings = getattr(host_sampler(dataloader), "settings", {})
        for key in settings.keys() & self._given.keys():
            theirs, ours = (each[key] for each in (settings, self._given))
            if (as_dict(theirs) != as_dict(ours)) if key == "policy" else theirs != ours:
                raise ValueError(
                    f"InfoBatchHook has {key}={self._given[key]!r}, but InfoBatchSampler has {key}={settings[key]!r}: "
                    "set it in one of them"
                )
        return given(**{**settings, **self._given})

    def _watch(self, loop: BaseLoop) -> IndexedLoader:
        """Learn the indices of the host's own batches and leave all else as it is."""
        sampler = host_sampler(loop.dataloader)
        if isinstance(sampler, InfoBatchSampler):
            raise ValueError("policy='none' keeps the host's own sampler: remove InfoBatchSampler from the config")
        if self._item_seed:
            raise ValueError(
                "policy='none' keeps the host's own random streams: remove item_seed=True, or use prune_ratio=0 for a "
                "full-data baseline"
            )
        iterator = getattr(loop, "dataloader_iterator", None)
        # Upstream's iteration loop has made its iterator by now: its workers may have drawn from the
        # sampler, and it has drawn a seed from the global generator that must not be drawn twice.
        started = getattr(iterator, "_iterator", None) is not None
        fresh = None
        if started and type(sampler) is InfiniteSampler:
            fresh = InfiniteSampler(loop.dataloader.dataset, shuffle=sampler.shuffle, seed=sampler.seed)
        loader = IndexedLoader(loop.dataloader, fresh, own_seed=0 if started else None)
        loop.dataloader = loader
        if iterator is not None:
            loop.dataloader_iterator = type(iterator)(loader)
        return loader

    def _take_over(self, runner: Any, loop: BaseLoop) -> tuple[BaseLoop, IndexedLoader]:
        """Put a pruned loop in place of the host's."""
        if isinstance(loop, (InfoBatchEpochLoop, InfoBatchIterLoop)):
            return loop, loop.dataloader
        loader = pass_loader(loop.dataloader, run_seed(runner))
        pruned: BaseLoop
        if type(loop) is EpochBasedTrainLoop:
            pruned = InfoBatchEpochLoop(
                runner, loader, max_epochs=loop.max_epochs, val_begin=loop.val_begin, val_interval=loop.val_interval
            )
            pruned._max_iters = loop.max_iters
        elif type(loop) is IterBasedTrainLoop:
            pruned = InfoBatchIterLoop(
                runner, loader, max_iters=loop.max_iters, val_begin=loop.val_begin, val_interval=loop.val_interval
            )
        else:
            raise ValueError(
                f"the training loop {type(loop).__name__} cannot be followed: use EpochBasedTrainLoop or "
                "IterBasedTrainLoop, or policy='none'"
            )
        # A runner that was resumed by hand stands at the checkpoint's iteration already.
        pruned._iter, pruned._epoch = loop.iter, loop.epoch
        pruned.dynamic_milestones, pruned.dynamic_intervals = loop.dynamic_milestones, loop.dynamic_intervals
        runner._train_loop = pruned
        return pruned, loader

    @staticmethod
    def _schedule(loop: BaseLoop, loader: IndexedLoader) -> Schedule:
        num_samples = len(loader.dataset)
        global_batch = loader.batch_sampler.batch_size * get_dist_info()[1]
        if isinstance(loop, EpochBasedTrainLoop):
            epoch_batches = loop.max_iters // loop.max_epochs
            if epoch_batches == 0:
                raise ValueError(
                    f"the train_dataloader gives no batch: {num_samples} samples, a global batch of {global_batch} and "
                    "drop_last=True; use a smaller batch size"
                )
            return EpochSchedule(num_samples, loop.max_epochs, global_batch, epoch_batches)
        return IterSchedule(num_samples, loop.max_iters, global_batch)

    def after_run(self, runner: Any) -> None:
        """Give the wrapped objects of this run back to the host."""
        self._over = self._over or self._pruner is not None
        self._unwire()

    def _unwire(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        self._pruner = self._pacer = self._views = None

    # ---- resume -----------------------------------------------------------------------------------

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Keep our state of a checkpoint until it is known whether it is resumed or only its weights are taken."""
        # The host loads onto the device; there it would lie beside the model until the training begins.
        self._state = apply_to(checkpoint.pop(STATE_KEY, None), torch.is_tensor, lambda tensor: tensor.cpu())
        if self._pruner is None or not runner._resume:
            return
        if self._state is not None:
            check_state(self._state)
            self._pruner.check_state(self._state["pruner"])
            self._check_repeats(self._state.get("num_repeats", 1))
        if "optimizer" not in checkpoint:
            runner.logger.warning(
                "InfoBatch: this checkpoint holds no optimizer and no schedulers, as those of save_best: momenta and "
                "learning rates start anew; resume from one of CheckpointHook's interval to go on exactly"
            )

    def _check_repeats(self, saved: int) -> None:
        if saved != self._num_repeats:
            raise ValueError(
                f"cannot resume: the checkpoint was trained with {saved} visits of a sample in a row, this run makes "
                f"{self._num_repeats} (num_repeats); use the same sampler, or start a new run from its weights with "
                "load_from"
            )

    def before_train(self, runner: Any) -> None:
        """Continue where the checkpoint was written."""
        if self._pruner is None:
            return
        self._started = time.perf_counter()
        state, self._state = self._state, None
        require_equal(iteration=runner.iter)
        if runner.iter == 0 or self._pruner.samples_seen:
            return  # a new run, possibly from another's weights, or one that was interrupted and goes on
        if state is None:
            self._start_without_scores(runner)
        else:
            self._go_on(runner, state)

    def _start_without_scores(self, runner: Any) -> None:
        """Take up a run that was not pruned so far."""
        pruner = self._pruner
        assert pruner is not None
        schedule = pruner.schedule
        if isinstance(schedule, EpochSchedule):
            pruner.start_at(runner.epoch)
            if runner.epoch and not 0 <= runner.iter - schedule.steps_before(runner.epoch) < schedule.pass_steps:
                # Epochs were of other batches; the schedulers come out of the checkpoint with their length.
                schedule.pass_steps = runner.iter // runner.epoch
        else:
            self._find_position(runner.iter)
        if self._pacer is not None:
            self._pacer.taken = runner.iter
        pruner.full_before = 0
        pruner.visits_before = pruner.samples_full - pruner.visited
        runner.logger.warning(
            f"InfoBatch: the checkpoint was written without InfoBatchHook; scores start empty at pass "
            f"{pruner.pass_index + 1} of {pruner.schedule.num_passes}"
        )

    def _go_on(self, runner: Any, state: dict[str, Any]) -> None:
        """Take up a run of ours."""
        pruner = self._pruner
        assert pruner is not None
        goes_on = pruner.load_state_dict(state["pruner"])
        self._time_before = float(state["wall_time_s"])
        self._weigher.mixes = self._weigher.mixes or bool(state.get("mixes", False))
        if self._pacer is not None:
            self._pacer.taken = int(state["scheduler_steps"])
        if not goes_on:
            schedule, batch_size = pruner.schedule, state["pruner"]["batch_size"]
            # Iterations are the host's measure there: as many samples as the batch now holds.
            if isinstance(schedule, IterSchedule):
                self._find_position(runner.iter if self._pacer is None else self._pacer.taken)
            if batch_size != schedule.batch_size:
                differs = f"a global batch of {batch_size}, this run has {schedule.batch_size}"
            else:
                before = state["pruner"]["schedule"]["total_steps"]
                differs = f"a schedule of {before} iterations of full data, this run has {schedule.total_steps}"
            if pruner.finished:
                raise ValueError(
                    f"cannot resume: the checkpoint was written with {differs}, and stands at "
                    f"{state['scheduler_steps']} of them: nothing is left to train; use a longer schedule"
                )
            runner.logger.warning(
                f"InfoBatch: the checkpoint was written with {differs}: the scores are kept; the run goes on in pass "
                f"{pruner.pass_index + 1} of {schedule.num_passes}, drawn anew, after {pruner.visited} of its "
                f"{len(pruner.begin_pass()) if self._pacer else schedule.full_visits(pruner.pass_index)} visits"
            )
        if self._seed not in (None, pruner.seed):
            runner.logger.warning(f"InfoBatch: seed={self._seed} is not used, the checkpoint's seed={pruner.seed} is")
        if self._pacer is not None:
            process_state.restore(runner, state)
        elif isinstance(pruner.schedule, EpochSchedule):
            pruner.visited = 0  # the host's own loop starts an epoch anew

    def _find_position(self, steps: int) -> None:
        """Go to where a schedule of iterations stands after so many of them."""
        pruner = self._pruner
        assert pruner is not None
        done, rest = divmod(steps * pruner.schedule.batch_size, pruner.schedule.num_samples)
        if self._pacer is None:  # the host's own sampler has no plan
            pruner.start_at(done)
            pruner.visited = min(rest, pruner.schedule.full_visits(done))
        else:
            pruner.start_at(done, rest, max(1, pruner.schedule.full_visits(done)))

    def _keep_validation_aside(self, runner: Any) -> None:
        """Keep validation, and what hooks do before and after it, out of the random streams of this run.

        A run that resumes after a validation does not repeat it.
        """
        loop = getattr(runner, "_val_loop", None)
        if not isinstance(loop, BaseLoop):
            return
        validate = loop.run

        def run() -> Any:
            self._rng_before_val = rng.capture()
            try:
                return validate()
            finally:
                rng.restore(self._rng_before_val)
                self._rng_before_val = None

        loop.run = run  # type: ignore[method-assign]
        self._undo.append(lambda: vars(loop).pop("run"))

    @contextmanager
    def _exchanged(self, runner: Any) -> Iterator[None]:
        """Let rank 0 know what all processes hold while it writes a checkpoint, or two."""
        assert self._pruner is not None
        self._pruner.store.merge()
        self._process_state = process_state.capture(runner, self._rng_before_val)
        try:
            yield
        finally:
            self._process_state = None

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Add our state, under one key, and renew the summary."""
        if self._pruner is None:
            return
        # Who saves otherwise than by CheckpointHook does so on this process only.
        processes = self._process_state or process_state.capture(runner, self._rng_before_val, alone=True)
        checkpoint[STATE_KEY] = {
            "pruner": self._pruner.state_dict(),
            "scheduler_steps": 0 if self._pacer is None else self._pacer.taken,
            "wall_time_s": self._wall_time(),
            "num_repeats": self._num_repeats,
            "mixes": self._weigher.mixes,
            **processes,
        }
        self._write_summary(runner)

    # ---- a pass -----------------------------------------------------------------------------------

    def before_pass(self, runner: Any) -> None:
        """Plan the pass and tell the host how long the run will be."""
        pruner = self._pruner
        if pruner is None:
            raise ValueError("InfoBatchHook has given this run back to the host: build a new Runner to train again")
        schedule = pruner.schedule
        plan = pruner.begin_pass()
        later = sum(schedule.full_batches(p) for p in range(pruner.pass_index + 1, schedule.num_passes))
        renew_max_iters(runner, runner.iter - pruner.batches_done + pruner.batches + later)
        self._warn_if_nothing_pruned(runner)
        position = f", from visit {pruner.visited} on" if pruner.visited else ""
        threshold = "" if plan.threshold is None else f", threshold {plan.threshold:.4f}"
        runner.logger.info(
            f"InfoBatch pass {pruner.pass_index + 1}/{schedule.num_passes}: {len(plan)} of "
            f"{schedule.full_visits(pruner.pass_index)} samples in {pruner.batches} iterations{threshold}{position}"
        )

    def before_train_epoch(self, runner: Any) -> None:
        """Look at the model's losses anew in the first batch: other hooks may exchange them in an epoch's beginning."""
        self._views_due = True

    def _renew_views(self, runner: Any) -> None:
        assert self._views is not None and self._pruner is not None
        due, self._views_due = self._views_due or not self._views.in_place, False
        if due and self._views.renew():
            runner.logger.info(
                "InfoBatch: the model's losses or batch augmentations were exchanged and are weighed anew"
            )
            self._tell_what_is_not_separable(runner, self._pruner.policy)

    def _warn_if_nothing_pruned(self, runner: Any) -> None:
        pruner = self._pruner
        assert pruner is not None and pruner.plan is not None
        if self._warned_nothing_pruned or pruner.plan.pruned or not pruner.is_active or not pruner.store.seen.any():
            return
        self._warned_nothing_pruned = True
        runner.logger.warning(
            f"InfoBatch: nothing could be pruned in pass {pruner.pass_index + 1}, so it visits every sample: all "
            "scores are alike, or fewer samples lie below the mean than one global batch holds"
        )

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Look up the weights of the batch."""
        if self._pruner is None:
            return
        self._renew_views(runner)
        # Taken here and kept: another hook may walk the loader before the step is over.
        self._batch = runner.train_dataloader.take(data_batch)
        self._updates_before = [wrapper._inner_count for wrapper in process_state.optim_wrappers(runner)]
        indices = self._batch.indices
        if self._pacer is None:
            self._weigher.begin(torch.ones(len(indices)), pruned=False)
        else:
            plan = self._pruner.plan
            assert plan is not None
            self._weigher.begin(self._pruner.weights(indices), plan.pruned, indices, plan.pair_weights)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Record the scores of the batch and count its visits."""
        pruner = self._pruner
        if pruner is None:
            return
        indices = self._batch.indices
        scored = self._scored(runner)
        if scored is None:
            pruner.own_skipped += len(indices)
        else:
            pruner.record(indices, *scored)
        if self._pacer is not None:
            pruner.advance(len(indices) * runner.world_size)
        else:
            passes, schedule = pruner.pass_index, pruner.schedule
            # All processes must find the end of a pass in the same iteration, whose batches may differ in size.
            left = schedule.full_visits(passes) - pruner.visited
            pruner.observe(min(schedule.batch_size, left) if schedule.loop == "epochs" else schedule.batch_size)
            if pruner.pass_index > passes:
                self._log_pass(runner)

    def _scored(self, runner: Any) -> tuple[Tensor, Tensor] | None:
        """Scores of the batch and which of them are valid; None if a ``train_step`` left it out, as after a NaN."""
        reached = self._weigher.reached
        scores, valid = self._weigher.end()
        if scores is None or valid is None:
            updates = [wrapper._inner_count for wrapper in process_state.optim_wrappers(runner)]
            if not reached and updates == self._updates_before:
                return None
            raise ValueError(f"{type(runner.model).__name__} computed no loss that InfoBatchHook has a view of")
        replaced = self._batch.replaced
        return scores, valid & ~moved(replaced, valid.device) if bool(replaced.any()) else valid

    def after_pass(self, runner: Any) -> None:
        """Merge the scores of all processes and book the pass."""
        assert self._pruner is not None
        self._pruner.finish_pass()
        self._log_pass(runner)

    def _steps_due(self) -> int:
        pruner = self._pruner
        assert pruner is not None and pruner.plan is not None
        return pruner.schedule.steps_at(pruner.pass_index, pruner.batches_done, pruner.batches)

    # ---- books ------------------------------------------------------------------------------------

    def _log_pass(self, runner: Any) -> None:
        pruner = self._pruner
        assert pruner is not None
        entry = pruner.history[-1]
        runner.visualizer.add_scalars(
            pruner.scalars(),
            # Within an iteration the host counts it as done: steps must never go back.
            step=runner.iter + (self._pacer is None),
        )
        store = pruner.store
        unusable = f", skipped {entry['skipped']} visits" if entry["skipped"] else ""
        if store.num_nonfinite or store.num_invalid:
            unusable += (
                f"; not recorded so far: {store.num_nonfinite} NaN or infinite losses, {store.num_invalid} samples "
                "without a valid pixel or replaced by another"
            )
        runner.logger.info(
            f"InfoBatch pass {entry['pass'] + 1} done: kept {entry['kept_ratio']:.1%}, saved so far "
            f"{pruner.saved_ratio:.1%}{unusable}"
        )

    def after_train(self, runner: Any) -> None:
        """Leave summary and scores behind."""
        if self._pruner is None:
            return
        self._pruner.store.merge()
        self._write_summary(runner)
        self._write_scores(runner)

    def _wall_time(self) -> float:
        return self._time_before + time.perf_counter() - self._started

    @master_only
    def _write_summary(self, runner: Any) -> None:
        assert self._pruner is not None
        summary = self._pruner.summary(
            iterations=getattr(runner.train_loop, "_iter", 0),
            iterations_full=self._pruner.schedule.total_steps,
            wall_time_s=round(self._wall_time(), 3),
        )
        _warn_on_failure(runner, lambda: write_summary(runner.work_dir, summary))

    @master_only
    def _write_scores(self, runner: Any) -> None:
        pruner = self._pruner
        assert pruner is not None
        dataset, length = runner.train_dataloader.dataset, pruner.store.num_samples
        # Folder and file: folders may stand for classes.
        names = [sample_name(dataset, i, folders=1) for i in range(length)] if sample_name(dataset, 0) else None
        _warn_on_failure(runner, lambda: write_scores(runner.work_dir, pruner.store, names))


def check_runner(runner: Any) -> None:
    """Refuse what shards the model or drives the run by other means than the hook can follow.

    Raises:
        ValueError: For another runner than MMEngine's ``Runner``, or a model wrapped otherwise than for data
            parallelism.
    """
    if not isinstance(runner, Runner):
        strategy = type(getattr(runner, "strategy", None)).__name__
        raise ValueError(
            f"{type(runner).__name__} with {strategy} is not supported: losses are weighed per sample on a whole "
            "model; remove runner_type and strategy from the config to train with Runner and MMDistributedDataParallel"
        )
    if runner.world_size > 1 and not isinstance(runner.model, DistributedDataParallel):
        raise ValueError(
            f"the model wrapper {type(runner.model).__name__} is not supported: losses are weighed per sample on a "
            "whole model; use model_wrapper_cfg=dict(type='MMDistributedDataParallel')"
        )


def fingerprint(dataset: Any) -> str:
    """Short hash of sample names, evenly spread over the data set; '' where it has no names."""
    length = len(dataset)
    names = [sample_name(dataset, i * length // _FINGERPRINT_NAMES) for i in range(min(length, _FINGERPRINT_NAMES))]
    return hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest() if any(names) else ""


def _warn_on_failure(runner: Any, write: Callable[[], None]) -> None:
    """A full disk must not end a training."""
    try:
        write()
    except OSError as error:
        runner.logger.warning(f"InfoBatch: could not write to {runner.work_dir}: {error}")
