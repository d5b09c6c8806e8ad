"""The unpruned run with fewer visits, its learning-rate schedule complete."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core import Schedule

if TYPE_CHECKING:
    from mmengine.config import Config

# Settings of schedulers that are points in time, and those that are spans of it.
_POINTS, _SPANS = ("begin", "end", "milestones"), ("T_max", "total_steps", "step_size")
_WARM_UPS = ("Linear", "Constant", "Warmup")


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
    # Schedulers that count iterations in a loop of epochs have more of them.
    units = [schedule.full_batches(0) if by_epoch and not s.get("by_epoch", True) else 1 for _, s in schedulers]
    warm_up = 0.0
    for (_, scheduler), unit in zip(schedulers, units, strict=True):
        end = scheduler.get("end", math.inf) / unit
        if end < new and any(part in str(scheduler.type) for part in _WARM_UPS):
            warm_up = max(warm_up, end)

    options = [f"train_cfg.{'max_epochs' if by_epoch else 'max_iters'}={new}"]
    for (name, scheduler), unit in zip(schedulers, units, strict=True):
        changed = _changed(scheduler, _Shortening(old, new, warm_up, unit))
        options += [f"{name}.{key}={value}".replace(" ", "") for key, value in changed.items()]
    return options


@dataclass(frozen=True)
class _Shortening:
    """Where the points in time of a scheduler come to lie.

    Attributes:
        old (int): End of the run before, in units of its loop: epochs, or iterations.
        new (int): Its end now.
        warm_up (float): Up to where nothing moves, in the same units.
        unit (int): Units of the scheduler in one of the loop.
    """

    old: int
    new: int
    warm_up: float
    unit: int

    def moved(self, point: float) -> int:
        """A point in time, in units of the scheduler."""
        time = point / self.unit
        if time > self.warm_up:
            time = self.warm_up + (time - self.warm_up) * (self.new - self.warm_up) / (self.old - self.warm_up)
        return round(self.unit * time)


def _changed(scheduler: Any, shortening: _Shortening) -> dict[str, Any]:
    """The settings of a scheduler that are others in the shortened run."""
    changed: dict[str, Any] = {}
    begin = scheduler.get("begin", 0)
    for key in (*_POINTS, *_SPANS):
        before = scheduler.get(key)
        if before is None:
            continue
        after: Any
        if isinstance(before, (list, tuple)):
            after = [shortening.moved(point) for point in before]
        elif key in _SPANS:
            after = max(1, shortening.moved(begin + before) - shortening.moved(begin))
        else:
            after = shortening.moved(before)
        if after != before:
            changed[key] = after
    return changed


def _schedulers(cfg: Config) -> Iterator[tuple[str, Any]]:
    """The parameter schedulers of a config and where they stand in it."""
    schedulers = cfg.get("param_scheduler") or []
    if isinstance(schedulers, dict):
        if "type" not in schedulers:
            raise ValueError("the config has schedulers for each of several optimisers: they cannot be shortened")
        yield "param_scheduler", schedulers
    else:
        yield from ((f"param_scheduler.{i}", scheduler) for i, scheduler in enumerate(schedulers))
