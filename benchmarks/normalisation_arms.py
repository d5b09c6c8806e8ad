"""The arms of the benchmark of normalisation, and the batches that each visits."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from normalisation_remedies import deal


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train, and what it is expected to do."""

    why: str
    policy: str = "variance"
    norm: str = "none"
    balanced: bool = False
    pi_min: float = 0.1
    bound: float = 4.0
    rescale: str = "unbiased"
    frozen: str = ""
    uniform_last: int = 0
    momentum: float = 0.1
    first: str = "full"
    spread: str = "even"


ARMS = {
    "full": Arm("BatchNorm, all visits: what there is to lose", policy="full"),
    "shortened": Arm("BatchNorm, full data, equal visits: what pruning has to beat", policy="shortened"),
    "none": Arm("BatchNorm as it is: biased batches, biased statistics, so worse than shortened"),
    "weighted": Arm("batch statistics weighted, weights up to 4: less bias, more noise", norm="weighted"),
    "weighted-10": Arm("the same, weights as they are: no bias, most noise", norm="weighted", bound=10.0),
    "renorm": Arm("weighted running averages, normalised by them: no bias, and noise averaged away", norm="renorm"),
    "frozen": Arm("recalibrated, then frozen at half of training: no bias from there, if they age well", frozen="half"),
    "refrozen": Arm("recalibrated and frozen at each pruned pass: no bias, young statistics", frozen="pass"),
    "balanced": Arm("every batch has its share of each weight: less noise, the bias stays", balanced=True),
    "balanced-weighted": Arm("both: weighted statistics whose noise is dealt away", norm="weighted", balanced=True),
    "balanced-weighted-10": Arm("the same, unbounded", norm="weighted", balanced=True, bound=10.0),
    "balanced-renorm": Arm("both: running averages of even batches", norm="renorm", balanced=True),
    "renorm-slow": Arm("the same over a longer window: less noise, older statistics", norm="renorm", momentum=0.03),
    "renorm-weighted": Arm(
        "all three, slow: gradients through weighted statistics", norm="renorm-weighted", balanced=True, momentum=0.03
    ),
    "mild": Arm("chances of 0.25 at least: batches less biased, less gain to be had", pi_min=0.25),
    "mild-balanced-weighted": Arm(
        "all three: no bias, weights of 4 at most, their noise dealt away",
        norm="weighted",
        balanced=True,
        pi_min=0.25,
        bound=10.0,
    ),
    "mild-renorm": Arm("both: smaller shifts for renorm to bridge", norm="renorm", pi_min=0.25),
    "uniform-last": Arm("equal chances in the last pass, as many visits: its statistics are unbiased", uniform_last=1),
    "uniform-last-2": Arm("the same in the last two: more time to settle, less gain", uniform_last=2),
    "weighted-uniform-last": Arm("both: weighted first, unbiased at the end", norm="weighted", uniform_last=1),
    "mild-uniform-last": Arm("both: batches less biased, unbiased at the end", pi_min=0.25, uniform_last=1),
    "group-full": Arm("GroupNorm, all visits", policy="full", norm="group"),
    "group-shortened": Arm("GroupNorm, equal visits", policy="shortened", norm="group"),
    "group": Arm("GroupNorm: the loss separates over samples, so pruning pays", norm="group"),
    "group-pooled": Arm(
        "no full pass first: equal chances, then unseen samples at the others' mean; more visits later",
        norm="group",
        first="pooled",
    ),
    "group-predicted": Arm(
        "no full pass first: scores of another seed's first pass, the best that a prediction can be",
        norm="group",
        first="predicted",
    ),
    "group-annealed": Arm("the last eighth of the passes full, delta = 0.875", norm="group", spread="annealed"),
    "group-by-rate": Arm(
        "visits in proportion to the learning rate: none where it is nothing", norm="group", spread="rate"
    ),
    "group-uniform-by-rate": Arm(
        "the same visits drawn uniformly: what the longer high rate does by itself",
        norm="group",
        spread="rate",
        uniform_last=99,
    ),
}
# Weights divided by their mean over the plan: one with 1 / chance under Adam, another learning rate under SGD.
ARMS |= {
    f"{name}-step": dataclasses.replace(ARMS[name], rescale="step", why=f"{name}, the host's step size kept")
    for name in ("none", "renorm", "balanced-weighted-10", "mild-balanced-weighted", "mild", "group")
}


def chances(scores: np.ndarray, total: int, pi_min: float) -> np.ndarray:
    """Clip ``c * scores`` to ``[pi_min, 1]``, c such that the chances sum to ``total``."""
    low, high = 0.0, 1.0 / max(float(scores[scores > 0].min()), 1e-12)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * scores, pi_min, 1).sum() < total else (low, middle)
    return np.clip(high * scores, pi_min, 1)


def systematic(pi: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """Draw exactly ``total`` indices, index i with chance ``pi[i]``, over a random order."""
    order = rng.permutation(len(pi))
    reach = np.cumsum(pi[order])
    ticks = np.floor(reach * (total / reach[-1]) + rng.random())
    return order[np.diff(ticks, prepend=0.0) > 0][:total]


def rate(progress: float) -> float:
    """Share of the peak learning rate: a warm-up of a twentieth, then a cosine."""
    decay = 0.5 * (1 + math.cos(math.pi * max(progress - 0.05, 0) / 0.95))
    return min((progress + 1e-3) / 0.05, 1.0) * decay


def batches_per_pass(arm: Arm, full: int, args: argparse.Namespace) -> list[int]:
    """Number of batches in each pass; in all, the share of the visits that is paid."""
    total = round((1 - args.saving) * full * args.passes)
    shares = np.ones(args.passes)
    if arm.spread == "rate":
        shares = np.array([rate((index + 0.5) / args.passes) for index in range(args.passes)])
    fixed = {0} if arm.first == "full" else set()
    if arm.spread == "annealed":
        fixed |= set(range(math.ceil(0.875 * args.passes - 1e-9), args.passes))
    free = [index for index in range(args.passes) if index not in fixed]
    wanted: np.ndarray = chances(shares[free], (total - full * len(fixed)) / full, arm.pi_min) * full
    counts = np.full(args.passes, full)
    counts[free] = np.diff(np.cumsum(wanted).round(), prepend=0)
    assert counts.sum() == total, (counts, total)
    return [int(count) for count in counts]


def batches(
    arm: Arm, n: int, scores: np.ndarray, args: argparse.Namespace, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, float, float, bool]]:
    """Yield indices, weights, their mean over the plan, progress in [0, 1), and whether a pruned pass begins.

    ``scores`` are read when a pass begins; 0 where a sample was never seen.
    """
    size, full = args.batch_size, n // args.batch_size
    steps = full * args.passes
    if arm.policy != "variance":
        steps = steps if arm.policy == "full" else round((1 - args.saving) * steps)
        for step in range(steps):
            if step % full == 0:
                order = rng.permutation(n)
            yield order[step % full * size :][:size], np.ones(size), 1.0, step / steps, False
        return
    for pass_index, kept in enumerate(batches_per_pass(arm, full, args)):
        if kept == full:
            picked, weights = rng.permutation(n)[: kept * size], np.ones(kept * size)
        else:
            equal_chances = pass_index >= args.passes - arm.uniform_last or not scores.any()
            known = np.where(scores > 0, scores, scores[scores > 0].mean()) if scores.any() else scores
            pi = chances(np.ones(n) if equal_chances else known, kept * size, arm.pi_min)
            picked = rng.permutation(systematic(pi, kept * size, rng))
            if arm.balanced:
                picked = picked[deal(1 / pi[picked], size, rng)]
            weights = 1 / pi[picked]
        for b in range(kept):
            part = slice(b * size, (b + 1) * size)
            progress = (pass_index + b / kept) / args.passes
            yield picked[part], weights[part], float(weights.mean()), progress, pass_index > 0 and b == 0
