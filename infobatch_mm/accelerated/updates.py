"""Optimiser steps: how many a pruned training makes, and where the unpruned one would be."""

from __future__ import annotations

import math

from ..core.pruner import Pruner
from .walk import PassWalk


def steps_due(walk: PassWalk, pruner: Pruner, batch_size: int, accumulated: int) -> int:
    """Updates that the unpruned run would have made by now.

    Args:
        walk (PassWalk): Where the training stands.
        pruner (Pruner): Its books.
        batch_size (int): Global batch size.
        accumulated (int): Batches to an update.
    """
    if not pruner.visited:
        return walk.schedule.steps_before(pruner.pass_index)
    updates = math.ceil(walk.batches / accumulated)
    return walk.schedule.steps_at(pruner.pass_index, _updates(pruner.visited, batch_size, accumulated), updates)


def updates_expected(walk: PassWalk, pruner: Pruner, batch_size: int, accumulated: int) -> int:
    """Updates of the whole training: those of passes to come as far as the last pruned one tells.

    Args:
        walk, pruner, batch_size, accumulated: As for :func:`steps_due`.
    """
    schedule = walk.schedule

    def prunes(pass_index: int) -> bool:
        return pruner.policy.is_active(schedule.progress(pass_index))

    kept = [entry["kept_ratio"] for entry in pruner.history if prunes(entry["pass"])]
    ratio = kept[-1] if kept else 1.0
    total = walk.updates_done
    is_begun = not pruner.finished and (pruner.plan is not None or pruner.visited > 0)
    if is_begun and not walk.is_pass_over:
        total += math.ceil(walk.batches / accumulated) - walk.batches_done // accumulated
    if pruner.plan is not None and pruner.plan.pruned:
        ratio = len(pruner.plan) / schedule.full_visits(pruner.pass_index)
    for coming in range(pruner.pass_index + is_begun, schedule.num_passes):
        whole = schedule.full_visits(coming)
        total += _updates(round(whole * ratio) if prunes(coming) else whole, batch_size, accumulated)
    return total


def _updates(visits: int, batch_size: int, accumulated: int) -> int:
    return math.ceil(math.ceil(visits / batch_size) / accumulated)
