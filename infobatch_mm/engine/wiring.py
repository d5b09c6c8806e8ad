"""From a host's run to one that is wired."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from mmengine.runner import BaseLoop

from ..core import Pruner, PruningPolicy, Training, Watcher
from ..core.distributed import require_equal
from ..core.recalibration import Recalibration
from ..core.score_rule import ScoreRule, build_score
from ..core.training import score_of
from ..losses import LossWeigher, attach_views
from ..policies import NoPruning
from .loader import IndexedLoader
from .process_state import bare_model
from .recalibration import norm_line
from .run import PrunedRun, Run, WatchedRun
from .sample_names import fingerprint
from .samplers import InfoBatchSampler, run_seed
from .takeover import schedule_of, take_over, watch
from .together import refused_together


@dataclass(frozen=True)
class Settings:
    """Arguments of :class:`.InfoBatchHook` that say what is recorded and drawn; see there."""

    seed: int | None
    item_seed: bool
    score_auxiliary: bool
    score: str | Mapping[str, Any] | ScoreRule | None
    score_ema: float | None
    norm: str | None = None


def wired(
    runner: Any, loop: BaseLoop, policy: PruningPolicy, settings: Settings, weigher: LossWeigher, undo: ExitStack
) -> Run:
    """Put our objects in their places in a run, or beside the host's where it keeps its order.

    Args:
        runner (Runner): The runner.
        loop (BaseLoop): Its training loop.
        policy (PruningPolicy): What to visit; :class:`.NoPruning` leaves loop and order to the host.
        settings (Settings): What the user says beside it.
        weigher (LossWeigher): Weighs the model's losses.
        undo (ExitStack): Takes what gives the host's objects back, also where this raises.

    Raises:
        ValueError: If the model, the loop or the data cannot be followed.
    """
    watches = isinstance(policy, NoPruning)
    with refused_together():
        if len(loop.dataloader.dataset) == 0:
            raise ValueError("the training data set is empty: check data_root and data_prefix of the train_dataloader")
        rule = build_score(*score_of(policy, settings.score, settings.score_ema))
        weigher.takes_norms = rule.takes_norms
        views = attach_views(bare_model(runner), weigher, settings.score_auxiliary, rule.layer)
        undo.callback(views.restore)
        if watches and settings.item_seed:
            raise ValueError(
                "policy='none' keeps the host's own random streams: remove item_seed=True, or use prune_ratio=0 for a "
                "full-data baseline"
            )
        loader: IndexedLoader
        if watches:
            loader = watch(runner, loop)
        else:
            loop, loader = take_over(runner, loop)
        training = _training(runner, loop, loader, policy, settings)
    require_equal(num_repeats=loader.num_repeats, **training.identity())
    if isinstance(training, Pruner):
        if (line := norm_line(bare_model(runner), settings.norm)) is not None:
            runner.logger.info(line)
        recalibration = Recalibration(training) if settings.norm == "recalibrate" else None
        return PrunedRun(runner, loop, training, loader, views, weigher, undo, recalibration)
    assert isinstance(training, Watcher)
    return WatchedRun(training, loader, views, weigher)


def _training(
    runner: Any, loop: BaseLoop, loader: IndexedLoader, policy: PruningPolicy, settings: Settings
) -> Training:
    sampler, seed = loader.sampler, settings.seed
    if seed is None:
        seed = sampler.seed if isinstance(sampler, InfoBatchSampler) else run_seed(runner)
    make: type[Pruner] | type[Watcher] = Watcher if isinstance(policy, NoPruning) else Pruner
    return make(
        schedule_of(runner, loop, loader),
        policy,
        seed,
        shuffle=getattr(sampler, "shuffle", True),
        fingerprint=fingerprint(loader.host_dataset, loader.num_units),
        item_seed=settings.item_seed,
        score_ema=settings.score_ema,
        score=settings.score,
    )
