"""The one line: a hook that wires pruning into a run of MMEngine's Runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop
from mmengine.utils import apply_to
from torch import Tensor

from ..core import Pruner, PruningPolicy, build_policy, rng
from ..core.devices import moved
from ..core.distributed import require_equal
from ..core.score_rule import check_score_ema
from ..core.summary import check_summary
from ..losses import AttachedViews, LossWeigher, attach_views
from ..policies import NoPruning
from . import process_state
from .books import Books
from .checkpoints import CheckpointGuard, check_resume_point, check_state
from .loader import BatchIndices, IndexedLoader
from .param_schedule import SchedulerPacer, renew_max_iters
from .resume import check_repeats, check_units, go_on, start_without_scores
from .sample_names import fingerprint
from .samplers import InfoBatchSampler, given, run_seed
from .takeover import check_runner, schedule_of, settings_of, take_over, watch, watched_visits
from .together import refused_together

#: Key of our state in a checkpoint.
STATE_KEY = "infobatch"


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
        self._books = Books()

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
        with refused_together():
            check_runner(runner)
        check_resume_point(runner)
        with refused_together():
            policy = build_policy(**settings_of(loop.dataloader, self._given))
            if len(loop.dataloader.dataset) == 0:
                raise ValueError(
                    "the training data set is empty: check data_root and data_prefix of the train_dataloader"
                )
            self._views = attach_views(process_state.bare_model(runner), self._weigher, self._score_auxiliary)
            self._undo.append(self._views.restore)
            loop, loader = self._take(runner, loop, policy)
            self._pruner = pruner = self._make_pruner(runner, loop, loader, policy)
        require_equal(num_repeats=self._num_repeats, **pruner.identity())
        if isinstance(loader.sampler, InfoBatchSampler):
            loader.sampler.bind(pruner)
            loop.pruner = pruner
            self._pacer = SchedulerPacer(runner, self._steps_due)
            self._undo.append(self._pacer.restore)
            self._keep_validation_aside(runner)
        self._undo.append(CheckpointGuard(runner, partial(self._exchanged, runner)).restore)
        self._tell_what_is_not_separable(runner)
        self._books.begin(runner, pruner, loader)
        if self._weigher.mixes:
            runner.logger.info(
                "InfoBatch: images are mixed; scores are their losses above the least that targets allow"
            )

    def _take(self, runner: Any, loop: BaseLoop, policy: PruningPolicy) -> tuple[BaseLoop, IndexedLoader]:
        """Take the run over, or watch it."""
        if not isinstance(policy, NoPruning):
            return take_over(runner, loop)
        if self._item_seed:
            raise ValueError(
                "policy='none' keeps the host's own random streams: remove item_seed=True, or use prune_ratio=0 for a "
                "full-data baseline"
            )
        return loop, watch(runner, loop)

    def _make_pruner(self, runner: Any, loop: BaseLoop, loader: IndexedLoader, policy: PruningPolicy) -> Pruner:
        sampler, seed = loader.sampler, self._seed
        if seed is None:
            seed = sampler.seed if isinstance(sampler, InfoBatchSampler) else run_seed(runner)
        self._num_repeats = getattr(sampler, "repeats", 1)
        return Pruner(
            schedule_of(runner, loop, loader),
            policy,
            seed,
            shuffle=getattr(sampler, "shuffle", True),
            fingerprint=fingerprint(loader.host_dataset, loader.num_units),
            item_seed=self._item_seed,
            score_ema=self._score_ema,
        )

    def _tell_what_is_not_separable(self, runner: Any) -> None:
        assert self._views is not None and self._pruner is not None
        if self._views.not_separable and not isinstance(self._pruner.policy, NoPruning):
            runner.logger.info(
                "InfoBatch: these losses do not separate over samples; in pruned passes the mean of the samples' own "
                f"losses is optimised in their place, which is not unbiased: {', '.join(self._views.not_separable)}"
            )

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
        with refused_together():
            if self._state is not None:
                check_state(self._state)
                saved = self._state["pruner"]
                if distinct := runner.train_dataloader.units.distinct:
                    check_units(saved.get("num_samples"), self._pruner.schedule.num_samples, distinct)
                self._state["pruner"] = self._pruner.check_state(saved)
                check_repeats(self._state.get("num_repeats", 1), self._num_repeats)
            if is_main_process():  # to others a file may appear late
                check_summary(runner.work_dir, self._pruner.summary())
        if "optimizer" not in checkpoint:
            runner.logger.warning(
                "InfoBatch: this checkpoint holds no optimizer and no schedulers, as those of save_best: momenta and "
                "learning rates start anew; resume from one of CheckpointHook's interval to go on exactly"
            )

    def before_train(self, runner: Any) -> None:
        """Continue where the checkpoint was written."""
        pruner = self._pruner
        if pruner is None:
            return
        self._books.start_clock()
        state, self._state = self._state, None
        require_equal(iteration=runner.iter, has_scores=state is not None)
        if runner.iter == 0 or pruner.visits:
            return  # a new run, possibly from another's weights, or one that was interrupted and goes on
        if state is None:
            start_without_scores(runner, pruner, self._pacer)
            return
        go_on(runner, pruner, self._pacer, state)
        self._books.time_before = float(state["wall_time_s"])
        self._weigher.mixes = self._weigher.mixes or bool(state.get("mixes", False))
        if self._seed not in (None, pruner.seed):
            runner.logger.warning(f"InfoBatch: seed={self._seed} is not used, the checkpoint's seed={pruner.seed} is")
        if self._pacer is not None:
            process_state.restore(runner, state)

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
            "wall_time_s": self._books.wall_time,
            "num_repeats": self._num_repeats,
            "mixes": self._weigher.mixes,
            **processes,
        }
        self._books.write_summary(runner, self._pruner)

    # ---- a pass -----------------------------------------------------------------------------------

    def before_pass(self, runner: Any) -> None:
        """Plan the pass and tell the host how long the run will be."""
        pruner = self._pruner
        if pruner is None:
            raise ValueError("InfoBatchHook has given this run back to the host: build a new Runner to train again")
        pruner.begin_pass()
        schedule, coming = pruner.schedule, min(pruner.pass_index + 1, pruner.schedule.num_passes)
        later = schedule.full_batches_before(schedule.num_passes) - schedule.full_batches_before(coming)
        renew_max_iters(runner, runner.iter - pruner.batches_done + pruner.batches + later)
        self._books.begin_pass(runner, pruner)

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
            self._tell_what_is_not_separable(runner)

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
            self._weigher.begin(torch.ones(len(indices), dtype=torch.float32, device="cpu"), pruned=False)
        else:
            plan = self._pruner.plan
            assert plan is not None
            weights, factor = self._pruner.weights(indices), self._pruner.blank_factor(len(indices))
            self._weigher.begin(weights, plan.pruned, indices, plan.pair_weights, blank_factor=factor)

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
            done = pruner.pass_index
            pruner.observe(watched_visits(pruner, batch_idx))
            if pruner.pass_index > done:
                # Within an iteration the host counts it as done: steps must never go back.
                self._books.end_pass(runner, pruner, step=runner.iter + 1)

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
        self._books.end_pass(runner, self._pruner, step=runner.iter)

    def _steps_due(self) -> int:
        pruner = self._pruner
        assert pruner is not None and pruner.plan is not None
        return pruner.schedule.steps_at(pruner.pass_index, pruner.batches_done, pruner.batches)

    def after_train(self, runner: Any) -> None:
        """Leave summary and scores behind."""
        if self._pruner is not None:
            self._pruner.store.merge()
            self._books.end(runner, self._pruner)
