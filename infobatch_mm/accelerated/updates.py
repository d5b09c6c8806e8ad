"""Optimiser steps: how many a pruned training makes, and where the unpruned one would be."""

from __future__ import annotations

import math

from ..core.training import Training
from .walk import PassWalk


def steps_due(walk: PassWalk, training: Training, accumulated: int) -> int:
    """Updates that the unpruned run would have made by now.

    Args:
        walk (PassWalk): Where the training stands.
        training (Training): Its books.
        accumulated (int): Batches to an update.
    """
    if not training.visited:
        return walk.schedule.steps_before(training.pass_index)
    done, updates = (math.ceil(batches / accumulated) for batches in (walk.batches_done, walk.batches))
    return walk.schedule.steps_at(training.pass_index, done, updates)


def updates_expected(walk: PassWalk, training: Training, batch_size: int, accumulated: int) -> int:
    """Updates of the whole training; how many the passes to come make is estimated from the last pruned one.

    Args:
        walk, training, accumulated: As for :func:`steps_due`.
        batch_size (int): Global batch size.
    """
    schedule = walk.schedule

    def prunes(pass_index: int) -> bool:
        return training.policy.is_active(schedule.progress(pass_index))

    kept = [entry["kept_ratio"] for entry in training.history if prunes(entry["pass"])]
    ratio = kept[-1] if kept else 1.0
    total = walk.updates_done
    is_begun = not training.finished and (training.plan is not None or training.visited > 0)
    if is_begun and not walk.is_pass_over:
        total += math.ceil(walk.batches / accumulated) - walk.batches_done // accumulated
    if training.plan is not None and training.plan.pruned:
        ratio = len(training.plan) / schedule.full_visits(training.pass_index)
    for coming in range(training.pass_index + is_begun, schedule.num_passes):
        whole = schedule.full_visits(coming)
        fewer = prunes(coming) and training.policy.keep == "batch"
        total += _updates(round(whole * ratio) if fewer else whole, batch_size, accumulated)
    return total


def _updates(visits: int, batch_size: int, accumulated: int) -> int:
    return math.ceil(math.ceil(visits / batch_size) / accumulated)
