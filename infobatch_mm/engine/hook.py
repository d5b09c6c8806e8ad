"""The one line: a hook that wires pruning into a run of MMEngine's Runner."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop
from mmengine.utils import apply_to

from ..core import PruningPolicy, Training, build_policy
from ..core.distributed import require_equal
from ..core.recalibration import check_norm
from ..core.score_rule import ScoreRule, build_score
from ..losses import LossWeigher
from .books import Books
from .checkpoints import CheckpointGuard, check_resume_point
from .resume import checked, go_on, start_without_scores
from .run import PrunedRun, Run
from .samplers import given
from .takeover import check_runner, settings_of
from .together import refused_together
from .wiring import Settings, wired

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
            host's random streams then differ from the unpruned run's. Defaults to False.
        score (str | dict | ScoreRule, optional): What samples are ranked by, with any policy: ``'raw'``, their last
            loss, as in the paper; ``'ema'``, the average over their visits, for losses that depend on a random mask or
            crop; a registered score of your own by its name or as ``dict(type=name, ...)`` with its arguments; or an
            instance. Defaults to ``'raw'``, or ``'ema'`` where ``score_ema`` is above 0.
        score_ema (float, optional): Decay of the average, in [0, 1). Defaults to 0.9 for scores that are averages.
        norm (str, optional): ``'recalibrate'`` estimates the running statistics of batch normalisation on 16 uniform
            batches before each validation and checkpoint, where the model has such layers: pruned batches are a biased
            sample, and so are their statistics. Defaults to None: they are left as the batches make them.

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
        score: str | Mapping[str, Any] | ScoreRule | None = None,
        score_ema: float | None = None,
        norm: str | None = None,
    ) -> None:
        check_norm(norm)
        self._given = given(prune_ratio=prune_ratio, delta=delta, policy=policy)
        build_policy(**self._given)
        if build_score(score, score_ema).needs_noise_levels:
            raise ValueError(
                f"score={score!r} needs the noise level of each sample, which the models of this host do not tell: use "
                "'raw' or 'ema'"
            )
        self._settings = Settings(seed, item_seed, score_auxiliary, score, score_ema, norm)
        self._weigher = LossWeigher()
        self._books = Books()
        self._run: Run | None = None
        self._undo = ExitStack()
        self._state: dict[str, Any] | None = None  # a checkpoint's, until it is known what becomes of it
        self._over = False

    @property
    def _pruner(self) -> Training | None:
        return None if self._run is None else self._run.training

    # ---- wiring -----------------------------------------------------------------------------------

    def before_run(self, runner: Any) -> None:
        """Wire this run; does nothing for validation and testing."""
        loop = getattr(runner, "_train_loop", None)
        if not isinstance(loop, BaseLoop) or self._over or self._run is not None:
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
        run = wired(runner, loop, policy, self._settings, self._weigher, self._undo)
        self._undo.callback(CheckpointGuard(runner, partial(run.exchanged, runner)).restore)
        run.say_what_is_not_separable(runner)
        self._books.begin(runner, run.training, run.loader)
        if self._weigher.mixes:
            runner.logger.info(
                "InfoBatch: images are mixed; scores are their losses above the least that targets allow"
            )
        self._run = run

    def after_run(self, runner: Any) -> None:
        """Give the wrapped objects of this run back to the host."""
        self._over = self._over or self._run is not None
        self._unwire()

    def _unwire(self) -> None:
        self._run = None
        self._undo.close()

    # ---- resume -----------------------------------------------------------------------------------

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Keep our state of a checkpoint until it is known whether it is resumed or only its weights are taken."""
        # The host loads onto the device; there it would lie beside the model until the training begins.
        self._state = apply_to(checkpoint.pop(STATE_KEY, None), torch.is_tensor, lambda tensor: tensor.cpu())
        if self._run is None or not runner._resume:
            return
        with refused_together():
            self._state = checked(runner, self._run, self._state)
        if "optimizer" not in checkpoint:
            runner.logger.warning(
                "InfoBatch: this checkpoint holds no optimizer and no schedulers, as those of save_best: momenta and "
                "learning rates start anew; resume from one of CheckpointHook's interval to go on exactly"
            )

    def before_train(self, runner: Any) -> None:
        """Continue where the checkpoint was written."""
        run = self._run
        if run is None:
            return
        self._books.start_clock()
        state, self._state = self._state, None
        require_equal(iteration=runner.iter, has_scores=state is not None)
        if runner.iter == 0 or run.training.visits:
            return  # a new run, possibly from another's weights, or one that was interrupted and goes on
        if state is None:
            start_without_scores(runner, run)
            return
        self._books.time_before = float(state["wall_time_s"])
        go_on(runner, run, state)
        if (seed := self._settings.seed) not in (None, run.training.seed):
            runner.logger.warning(f"InfoBatch: seed={seed} is not used, the checkpoint's seed={run.training.seed} is")

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Add our state, under one key, and renew the summary."""
        run = self._run
        if run is None:
            return
        # Who saves otherwise than by CheckpointHook does so on this process only.
        processes = run.processes or run.captured(runner, alone=True)
        checkpoint[STATE_KEY] = {
            "pruner": run.training.state_dict(),
            "scheduler_steps": run.steps_taken,
            "wall_time_s": self._books.wall_time,
            "num_repeats": run.loader.num_repeats,
            "mixes": self._weigher.mixes,
            **processes,
        }
        self._books.write_summary(runner, run.training)

    # ---- a pass -----------------------------------------------------------------------------------

    def before_pass(self, runner: Any) -> None:
        """Plan the pass and tell the host how long the run will be."""
        if self._run is None:
            raise ValueError("InfoBatchHook has given this run back to the host: build a new Runner to train again")
        assert isinstance(self._run, PrunedRun)  # a host's loop does not call it
        self._run.begin_pass(runner)
        self._books.begin_pass(runner, self._run.training)

    def before_train_epoch(self, runner: Any) -> None:
        """Look at the model's losses again in the first batch."""
        if self._run is not None:
            self._run.begin_epoch()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Look up the weights of the batch."""
        if self._run is not None:
            self._run.begin_batch(runner, data_batch)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Record the scores of the batch and count its visits."""
        run = self._run
        if run is None:
            return
        run.record(runner)
        if run.advance(runner, batch_idx):
            # Within an iteration the host counts it as done: steps must never go back.
            self._books.end_pass(runner, run.training, step=runner.iter + 1)

    def after_pass(self, runner: Any) -> None:
        """Merge the scores of all processes and book the pass."""
        assert self._run is not None
        self._run.training.finish_pass()
        self._books.end_pass(runner, self._run.training, step=runner.iter)

    def before_val_epoch(self, runner: Any) -> None:
        """Let a validation in the midst of training see running statistics of the data."""
        if self._run is not None:
            self._run.recalibrate(runner, validates=True)

    def after_train(self, runner: Any) -> None:
        """Leave summary and scores behind."""
        if self._run is not None:
            self._run.training.store.merge()
            self._books.end(runner, self._run.training)
