"""Training steps with weighing and without, in turn: what the benchmarks of a step share."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from infobatch_mm.core import ScoreStore
from infobatch_mm.losses import LossWeigher, attach_views


def steps_in_turn(
    model: nn.Module,
    loss: Callable[[], Tensor],
    weights: Tensor,
    lr: float,
    most: int,
    least: int = 1,
    seconds: float = math.inf,
    warm_up: int = 1,
    scores: Sequence[str] = ("raw",),
) -> list[dict[str, float]]:
    """Time SGD steps of one model on one batch: the host's own, and weighed ones by each score, in random order.

    A weighed step also looks its weights up by index and records its scores, as the hook does in a run.
    Views stay attached, and hand everything to the host in the steps without weights: what is found out in a
    run's first step is done in the warm-up.

    Args:
        model (nn.Module): The host's model, not attached.
        loss (Callable): Forward pass on the batch; gives the total loss.
        weights (Tensor): Shape ``(B,)``.
        lr (float): Learning rate.
        most (int): Rounds at most; each is one step of every kind.
        least (int): Rounds at least. Defaults to 1.
        seconds (float): No more rounds than ``least`` are begun after so long. Defaults to no limit.
        warm_up (int): Rounds that are not timed. Defaults to 1.
        scores (Sequence[str]): What samples are scored by. Defaults to the loss alone.

    Returns:
        list: Of each round the seconds of its steps, by the score's name; ``'host'`` without weighing.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    weigher = LossWeigher()
    stores = {score: ScoreStore(len(weights), score=score) for score in scores}
    weigher.takes_norms = any(store.rule.takes_norms for store in stores.values())  # which attaches what they need
    indices = torch.arange(len(weights))
    views = attach_views(model, weigher)

    def step(kind: str) -> float:
        store = stores.get(kind)
        weigher.takes_norms = store is not None and store.rule.takes_norms
        start = time.perf_counter()
        if store is not None:
            weigher.begin(weights[indices], True, indices)
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        if store is not None:
            found, valid = weigher.end()
            store.record(indices, found, valid)
        return time.perf_counter() - start

    kinds, order = [*stores, "host"], random.Random(0)
    rounds: list[dict[str, float]] = []
    try:
        for _ in range(warm_up):
            for kind in kinds:
                step(kind)
        start = time.perf_counter()
        while len(rounds) < least or (len(rounds) < most and time.perf_counter() - start < seconds):
            # A step leaves caches and memory to the next one: by turns each follows each.
            rounds.append({kind: step(kind) for kind in order.sample(kinds, len(kinds))})
    finally:
        views.restore()
    return rounds
