"""Training steps with weighing and without, in turn: what the benchmarks of a step share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from infobatch_mm.core import ScoreStore
from infobatch_mm.losses import LossWeigher, attach_views


def paired_steps(
    model: nn.Module,
    loss: Callable[[], Tensor],
    weights: Tensor,
    lr: float,
    most: int,
    least: int = 1,
    seconds: float = math.inf,
    warm_up: int = 1,
    score: str = "raw",
) -> list[tuple[float, float]]:
    """Time SGD steps of one model on one batch, alternately.

    A weighed step also looks its weights up by index and records its scores, as the hook does in a run.
    Views stay attached, and hand everything to the host in the steps without weights: what is found out in a
    run's first step is done in the warm-up.

    Args:
        model (nn.Module): The host's model, not attached.
        loss (Callable): Forward pass on the batch; gives the total loss.
        weights (Tensor): Shape ``(B,)``.
        lr (float): Learning rate.
        most (int): Pairs at most.
        least (int): Pairs at least. Defaults to 1.
        seconds (float): No more pairs than ``least`` are begun after so long. Defaults to no limit.
        warm_up (int): Pairs that are not timed. Defaults to 1.
        score (str): What samples are scored by. Defaults to ``'raw'``.

    Returns:
        list: Seconds with weighing and without, of each pair.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    weigher, store = LossWeigher(), ScoreStore(len(weights), score=score)
    weigher.takes_norms = store.rule.takes_norms
    indices = torch.arange(len(weights))
    views = attach_views(model, weigher)

    def step(weighed: bool) -> float:
        start = time.perf_counter()
        if weighed:
            weigher.begin(weights[indices], True, indices)
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        if weighed:
            scores, valid = weigher.end()
            store.record(indices, scores, valid)
        return time.perf_counter() - start

    def pair(weighed_first: bool) -> tuple[float, float]:
        first, second = step(weighed_first), step(not weighed_first)
        return (first, second) if weighed_first else (second, first)

    try:
        for _ in range(warm_up):
            pair(True)
        pairs: list[tuple[float, float]] = []
        start = time.perf_counter()
        while len(pairs) < least or (len(pairs) < most and time.perf_counter() - start < seconds):
            pairs.append(pair(len(pairs) % 2 == 1))
    finally:
        views.restore()
    return pairs
