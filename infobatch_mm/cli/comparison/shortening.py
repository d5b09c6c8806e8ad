"""The unpruned run with fewer visits, its learning-rate schedule complete."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from ...core import Schedule

if TYPE_CHECKING:
    from mmengine.config import Config

# Settings of schedulers that are points in time, those that are spans of it, and spans that follow one another.
_POINTS, _SPANS, _CHAINS = ("begin", "end", "milestones"), ("T_max", "total_steps", "step_size"), ("periods",)
# Settings of hooks that are points in time, such as switch_epoch, begin_iter and num_last_epochs.
_POINTS_OF_HOOKS = re.compile(r"(^|_)(epochs?|iters?|begin|end)(_|$)")
# What may be missing at the control's end, as a share of the visits of its arm.
_MISSING = 0.01
_WARM_UPS = ("Linear", "Constant", "Warmup")


def shortened(cfg: Config, schedule: Schedule, visits: int) -> list[str]:
    """Options that end the unpruned run after about as many visits, its learning-rate schedule shortened to them.

    A warm-up keeps its length; what comes after it is brought to the new end in proportion, as is ``val_begin``. A
    setting that a config leaves to the host, such as ``end``, follows by itself; the host validates the last epoch or
    iteration whatever its ``val_interval``.

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
        old, new = schedule.num_passes, whole(visits, schedule.full_visits(0))
    else:
        old, new = schedule.total_steps, whole(visits, schedule.batch_size)
    new = min(old, new)
    schedulers = list(_schedulers(cfg))
    # Schedulers that count iterations in a loop of epochs have more of them.
    units = [schedule.full_batches(0) if by_epoch and not s.get("by_epoch", True) else 1 for _, s in schedulers]
    warm_up = 0.0
    for (_, scheduler), unit in zip(schedulers, units, strict=True):
        end = scheduler.get("end", math.inf) / unit
        if end < new and any(part in str(scheduler.type) for part in _WARM_UPS):
            warm_up = max(warm_up, end)

    options = [f"train_cfg.{'max_epochs' if by_epoch else 'max_iters'}={new}"]
    begin = cfg.train_cfg.get("val_begin", 1)
    if begin > 1 and new < old:  # beyond the new end, nothing would be validated
        options.append(f"train_cfg.val_begin={max(1, math.floor(begin * new / old))}")
    for (name, scheduler), unit in zip(schedulers, units, strict=True):
        changed = _changed(scheduler, _Shortening(old, new, warm_up, unit))
        options += [f"{name}.{key}={value}".replace(" ", "") for key, value in changed.items()]
    return options


def whole(visits: int, each: int) -> int:
    """Epochs or steps of so many visits each that make as many visits, at least one.

    Rounded up where more than 1 % of the visits would be missing: a control with more visits is the harder opponent.
    """
    count = visits // each
    return max(1, count if count * each >= (1 - _MISSING) * visits else count + 1)


def unmoved_points(cfg: Config) -> list[str]:
    """Points in time that hooks of a config have, such as ``PipelineSwitchHook.switch_epoch=9``; they stay."""
    hooks = [*(cfg.get("custom_hooks") or []), *(cfg.get("default_hooks") or {}).values()]
    return [
        f"{hook.get('type')}.{key}={value}"
        for hook in hooks
        if isinstance(hook, dict)
        for key, value in hook.items()
        if _POINTS_OF_HOOKS.search(key) and isinstance(value, int) and not isinstance(value, bool) and value > 0
    ]


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
    for key in (*_POINTS, *_SPANS, *_CHAINS):
        before = scheduler.get(key)
        if before is None:
            continue
        after: Any
        if key in _CHAINS:
            ends = [shortening.moved(end) for end in accumulate(before, initial=begin)]
            after = [max(1, end - start) for start, end in pairwise(ends)]
        elif isinstance(before, (list, tuple)):
            after = [shortening.moved(point) for point in before]
        elif key in _SPANS:
            after = max(1, shortening.moved(begin + before) - shortening.moved(begin))
        else:
            after = shortening.moved(before)
        if after != (list(before) if isinstance(before, tuple) else before):
            changed[key] = after
    # The host refuses a scheduler without a step between its ends.
    if changed.get("end", math.inf) <= (start := changed.get("begin", begin)):
        changed["end"] = start + 1
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
