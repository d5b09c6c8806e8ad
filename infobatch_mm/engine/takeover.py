"""How a run is taken over from the host, or watched: its loop, its loader, its schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_dist_info
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..core import EpochSchedule, IterSchedule, Schedule, Training
from ..core.loader import check_indexable
from .loader import IndexedLoader
from .loops import InfoBatchEpochLoop, InfoBatchIterLoop
from .repeats import scored_units
from .samplers import InfoBatchSampler, as_dict, given, host_sampler, pass_loader, run_seed


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


def settings_of(loader: DataLoader, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Join the arguments of the hook and of a configured ``InfoBatchSampler``.

    Args:
        loader (DataLoader): The host's loader.
        ours (Mapping): What the hook was given, see :func:`.given`.

    Raises:
        ValueError: If the two differ.
    """
    theirs = getattr(host_sampler(loader), "settings", {})
    for key in theirs.keys() & ours.keys():
        there, here = theirs[key], ours[key]
        if (as_dict(there) != as_dict(here)) if key == "policy" else there != here:
            raise ValueError(
                f"InfoBatchHook has {key}={here!r}, but InfoBatchSampler has {key}={there!r}: set it in one of them"
            )
    return given(**{**theirs, **ours})


def watch(runner: Any, loop: BaseLoop) -> IndexedLoader:
    """Learn the indices of the host's own batches and leave all else as it is.

    Raises:
        ValueError: If the sampler is one of ours, or it is not known how many samples a batch holds.
    """
    sampler = host_sampler(loop.dataloader)
    if isinstance(sampler, InfoBatchSampler):
        raise ValueError("policy='none' keeps the host's own sampler: remove InfoBatchSampler from the config")
    check_indexable(loop.dataloader)
    iterator = getattr(loop, "dataloader_iterator", None)
    # Upstream's iteration loop has made its iterator by now: its workers may have drawn from the
    # sampler, and it has drawn a seed from the global generator that must not be drawn twice.
    started = getattr(iterator, "_iterator", None) is not None
    fresh = None
    if started and type(sampler) is InfiniteSampler:
        fresh = InfiniteSampler(loop.dataloader.dataset, shuffle=sampler.shuffle, seed=sampler.seed)
    by_iteration = not isinstance(loop, EpochBasedTrainLoop)
    units = scored_units(loop.dataloader.dataset, global_batch(runner, loop.dataloader), by_iteration)
    loader = IndexedLoader(loop.dataloader, fresh, own_seed=0 if started else None, units=units, watches=True)
    loop.dataloader = loader
    if iterator is not None:
        loop.dataloader_iterator = type(iterator)(loader)
    return loader


def take_over(runner: Any, loop: BaseLoop) -> tuple[BaseLoop, IndexedLoader]:
    """Put a pruned loop in place of the host's, unless it is one.

    Raises:
        ValueError: If the loop, or how its loader chooses samples, cannot be followed.
    """
    if isinstance(loop, (InfoBatchEpochLoop, InfoBatchIterLoop)):
        return loop, loop.dataloader
    loader = pass_loader(loop.dataloader, run_seed(runner), by_iteration=isinstance(loop, IterBasedTrainLoop))
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


def schedule_of(runner: Any, loop: BaseLoop, loader: IndexedLoader) -> Schedule:
    """The host's training as passes over the units of its loader.

    Raises:
        ValueError: If there is not one batch.
    """
    num_samples, batch_size = loader.num_units, global_batch(runner, loader)
    if not isinstance(loop, EpochBasedTrainLoop):
        return IterSchedule(num_samples, loop.max_iters, batch_size)
    epoch_batches = loop.max_iters // loop.max_epochs
    if epoch_batches == 0:
        raise ValueError(
            f"the train_dataloader gives no batch: {num_samples} samples, a global batch of {batch_size} and "
            "drop_last=True; use a smaller batch size"
        )
    return EpochSchedule(num_samples, loop.max_epochs, batch_size, epoch_batches)


def global_batch(runner: Any, loader: DataLoader) -> int:
    """Samples in one iteration of all processes: as the batch sampler says, or else the config, or its length.

    Raises:
        ValueError: If none of them does.
    """
    batches, world = loader.batch_sampler, get_dist_info()[1]
    for said in (getattr(batches, "batch_size", None), _configured(runner)):
        if isinstance(said, int) and said > 0:
            return said * world
    try:
        number = len(batches)
    except TypeError:
        number = 0
    if number == 0:
        raise ValueError(
            f"the batch sampler {type(batches).__name__} does not say how many samples a batch holds: give it an "
            "attribute batch_size, or a length, or set batch_size in the train_dataloader of the config"
        )
    return math.ceil(len(loader.dataset) / number)  # a process has every n-th of the samples


def watched_visits(training: Training, batch_idx: int) -> int:
    """Visits to book for an iteration of the host's own loop; the same on all processes, whose batches may differ.

    Args:
        training (Training): Keeps the books.
        batch_idx (int): The iteration's number within its epoch.

    Returns:
        int: So many that the passes of a loop of epochs end with them, however many batches the host makes of one.
    """
    schedule = training.schedule
    if schedule.loop == "iterations":
        return schedule.batch_size
    left = schedule.full_visits(training.pass_index) - training.visited
    later = schedule.full_batches(training.pass_index) - 1 - batch_idx
    if later <= 0:
        return left if later == 0 else 0
    return min(schedule.batch_size, max(0, left - later))


def _configured(runner: Any) -> Any:
    loader = runner.cfg.get("train_dataloader")
    return loader.get("batch_size") if isinstance(loader, Mapping) else None
