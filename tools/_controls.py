"""What a comparison takes from its configs: their length, and the options that make the control runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _arms import random_ratio
from mmengine.config import Config

from infobatch_mm.core import EpochSchedule, IterSchedule, Schedule

# Settings of schedulers that are points in time, and those that are spans of it.
_POINTS, _SPANS = ("begin", "end", "milestones"), ("T_max", "total_steps", "step_size")
_WARM_UPS = ("Linear", "Constant", "Warmup")


def is_by_epoch(cfg: Config) -> bool:
    """Whether a config trains by epochs, not by iterations."""
    return "max_epochs" in cfg.train_cfg


def schedule_of(cfg: Config, num_samples: int) -> Schedule:
    """The unpruned run of a config, as passes over its data."""
    batch_size = cfg.train_dataloader.batch_size
    if not is_by_epoch(cfg):
        return IterSchedule(num_samples, cfg.train_cfg.max_iters, batch_size)
    batches = num_samples / batch_size
    batches = math.floor(batches) if cfg.train_dataloader.get("drop_last") else math.ceil(batches)
    return EpochSchedule(num_samples, cfg.train_cfg.max_epochs, batch_size, batches)


def hook_index(cfg: Config) -> int | None:
    """Which of the config's ``custom_hooks`` is InfoBatch's."""
    types = [str(hook.get("type")) for hook in cfg.get("custom_hooks") or []]
    return next((i for i, name in enumerate(types) if "InfoBatchHook" in name), None)


def missing_data(cfg: Config) -> Path | None:
    """What a config's training data sets name and is not there, by their own ``data_root`` and ``ann_file``."""
    for dataset in _datasets(cfg.train_dataloader.dataset):
        root, annotations = (str(dataset.get(key) or "") for key in ("data_root", "ann_file"))
        for path in (root, str(Path(root, annotations)) if annotations else ""):
            if "://" not in path and not Path(path).exists():  # the host knows of other places than disks
                return Path(path)
    return None


def _datasets(dataset: Any) -> Iterator[Any]:
    """The data sets below the wrappers of a config."""
    inner = dataset.get("dataset")
    parts = dataset.get("datasets") or ([inner] if isinstance(inner, dict) else [])
    if not parts:
        yield dataset
    for part in parts:
        yield from _datasets(part)


def shortened(cfg: Config, schedule: Schedule, visits: int) -> list[str]:
    """Options that end the unpruned run after about as many visits, its learning-rate schedule shortened to them.

    A warm-up keeps its length; what comes after it is brought to the new end in proportion. A setting that a
    config leaves to the host, such as ``end``, follows by itself.

    Args:
        cfg (Config): The unpruned config.
        schedule (Schedule): Its :func:`schedule_of`.
        visits (int): Visits of the pruned run.

    Returns:
        list[str]: For ``--cfg-options``.

    Raises:
        ValueError: If the config has schedulers for each of several optimisers.
    """
    by_epoch = schedule.loop == "epochs"
    if by_epoch:
        old, new = schedule.num_passes, max(1, round(visits / schedule.full_visits(0)))
    else:
        old, new = schedule.total_steps, max(1, visits // schedule.batch_size)
    schedulers = list(_schedulers(cfg))
    # Those that count iterations in a loop of epochs have more of them.
    units = [schedule.full_batches(0) if by_epoch and not s.get("by_epoch", True) else 1 for _, s in schedulers]
    warm_up = 0.0  # in units of the loop
    for (_, scheduler), unit in zip(schedulers, units, strict=True):
        end = scheduler.get("end", math.inf) / unit
        if end < new and any(part in str(scheduler.type) for part in _WARM_UPS):
            warm_up = max(warm_up, end)

    def moved(point: float, unit: int) -> int:
        time = point / unit
        return round(
            unit * (time if time <= warm_up else warm_up + (time - warm_up) * (new - warm_up) / (old - warm_up))
        )

    options = [f"train_cfg.{'max_epochs' if by_epoch else 'max_iters'}={new}"]
    for (name, scheduler), unit in zip(schedulers, units, strict=True):
        begin = scheduler.get("begin", 0)
        for key in (*_POINTS, *_SPANS):
            before = scheduler.get(key)
            if before is None:
                continue
            after: Any
            if isinstance(before, (list, tuple)):
                after = [moved(point, unit) for point in before]
            elif key in _SPANS:
                after = max(1, moved(begin + before, unit) - moved(begin, unit))
            else:
                after = moved(before, unit)
            if after != before:
                options.append(f"{name}.{key}={after}".replace(" ", ""))
    return options


def _schedulers(cfg: Config) -> Iterator[tuple[str, Any]]:
    """The parameter schedulers of a config and where they stand in it."""
    schedulers = cfg.get("param_scheduler") or []
    if isinstance(schedulers, dict):
        if "type" not in schedulers:
            raise ValueError("the config has schedulers for each of several optimisers: they cannot be shortened")
        yield "param_scheduler", schedulers
    else:
        yield from ((f"param_scheduler.{i}", scheduler) for i, scheduler in enumerate(schedulers))


def at_random(cfg: Config, schedule: Schedule, summary: dict[str, Any]) -> list[str]:
    """Options that make the pruned run prune at random, as many visits as it saved; see :func:`_arms.random_ratio`.

    Args:
        cfg (Config): The pruned config.
        schedule (Schedule): Its :func:`schedule_of`.
        summary (dict): ``infobatch_summary.json`` of the pruned run.

    Returns:
        list[str]: For ``--cfg-options``.
    """
    ratio = random_ratio(schedule, summary)
    hook = f"custom_hooks.{hook_index(cfg)}"
    return [f"{hook}.policy=random", f"{hook}.prune_ratio={ratio:.6f}"]
