"""The paper's equations and the semantics of a plan, in slow plain Python.

A twin for the tests: it shares no code with the package and never imports it (nor torch). Equation numbers are
those of Qin et al., "InfoBatch", ICLR 2024. Differences from the paper, as the design states them: an exact
number k of the n well-learned samples is kept and weighs n/k, and unseen samples have no score at all.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from fractions import Fraction


def mean_score(scores: Sequence[float | None]) -> float | None:
    """Mean over the samples that have a score; None stands for "never seen"."""
    known = [score for score in scores if score is not None]
    if not known:
        return None
    return math.fsum(known) / len(known)


def is_below(score: float, mean: float) -> bool:
    """Compared in float32, as scores are: in double, the mean of equal scores can lie above them."""
    return score < struct.unpack("f", struct.pack("f", mean))[0]


def prune_probability(scores: Sequence[float | None], r: float, t: int, delta: float, num_passes: int) -> list[float]:
    """Eq. 3 and 10: r for a seen sample below the mean while t < delta * C, else 0."""
    mean = mean_score(scores)
    probabilities = []
    for score in scores:
        below = mean is not None and score is not None and is_below(score, mean)
        probabilities.append(r if below and t < pruned_passes(delta, num_passes) else 0.0)
    return probabilities


def pruned_passes(delta: float, num_passes: int) -> int:
    """How many passes t = 0, 1, ... satisfy t < delta * C, with delta read as the decimal that was typed."""
    count = 0
    while count < num_passes and Fraction(count) < Fraction(repr(delta)) * num_passes:
        count += 1
    return count


def update_scores(scores: list[float | None], visits: Sequence[int], losses: Sequence[float]) -> list[float | None]:
    """Eq. 4: a visited sample's score becomes its loss, an unvisited one keeps its score."""
    updated = list(scores)
    for index, loss in zip(visits, losses, strict=True):
        if math.isfinite(loss):
            updated[index] = loss
    return updated


def kept_count(n: int, others: int, r: float, multiple_of: int) -> int:
    """The k in 1..n nearest to (1 - r) * n for which all visits divide (the lower of two), else n.

    A weight n/k is at most twice the nominal one, 1 / (1 - r).
    """
    best = None
    for k in range(1, n + 1):
        if (others + k) % multiple_of == 0 and n / k <= 2 / (1 - r) * (1 + 1e-9):
            distance = abs(k - (1 - r) * n)
            if best is None or distance < best[0]:
                best = (distance, k)
    return n if best is None else best[1]


def expected_visits(scores: Sequence[float | None], r: float, multiple_of: int) -> int:
    """Visits of a pruned pass."""
    well_learned = [p for p in prune_probability(scores, 1.0, 0, 1.0, 1) if p > 0]
    others = len(scores) - len(well_learned)
    return others + kept_count(len(well_learned), others, r, multiple_of)


def plan_weights(scores: Sequence[float | None], visited: Sequence[int]) -> dict[int, float]:
    """Eq. 6 with the exact draw: n/k for a visited well-learned sample, 1 for any other visited sample."""
    mean = mean_score(scores)
    well_learned = set()
    for index, score in enumerate(scores):
        if score is not None and mean is not None and is_below(score, mean):
            well_learned.add(index)
    kept = [index for index in visited if index in well_learned]
    weights = {}
    for index in visited:
        weights[index] = len(well_learned) / len(kept) if index in well_learned else 1.0
    return weights


def expected_rescaled_sum(losses: Sequence[float], well_learned: Sequence[int], k: int) -> float:
    """Eq. 7-9 by brute force: the mean, over all draws of k of the n, of the weighted sum of the losses."""
    n = len(well_learned)
    certain = [loss for index, loss in enumerate(losses) if index not in set(well_learned)]
    sums = []
    for kept in itertools.combinations(well_learned, k):
        sums.append(math.fsum(certain) + math.fsum(n / k * losses[index] for index in kept))
    return math.fsum(sums) / len(sums)


def weighted_mean(losses: Sequence[float], weights: Sequence[float]) -> float:
    """Eq. 7 for one batch: mean of gamma * loss; never divided by the sum of gamma."""
    total = 0.0
    for loss, weight in zip(losses, weights, strict=True):
        total += weight * loss
    return total / len(losses)


def steps_after_pass(p: int, num_samples: int, batch_size: int, max_iters: int) -> int:
    """Steps of the host's per-iteration schedulers after p passes, by walking the samples of full data."""
    steps = in_batch = 0
    for _ in range(p * num_samples):
        if steps == max_iters:
            break
        in_batch += 1
        if in_batch == batch_size:
            steps, in_batch = steps + 1, 0
    return steps


class ReferenceRun:
    """A training's scores and weights, stepped beside the package's.

    The draw itself cannot be repeated without the package's random numbers, so the twin takes which samples were
    visited and answers what they must have weighed, or why that cannot have been a legal pass.
    """

    def __init__(self, num_samples: int, num_passes: int, r: float, delta: float, multiple_of: int = 1) -> None:
        self.scores: list[float | None] = [None] * num_samples
        self.num_passes = num_passes
        self.r = r
        self.delta = delta
        self.multiple_of = multiple_of
        self.t = 0

    def prunes(self) -> bool:
        """Whether the pass that is about to come leaves samples out."""
        return self.visits() < len(self.scores)

    def visits(self) -> int:
        """Visits of the pass that is about to come."""
        if self.r == 0 or self.t >= pruned_passes(self.delta, self.num_passes):
            return len(self.scores)
        return expected_visits(self.scores, self.r, self.multiple_of)

    def weights(self, visited: Sequence[int]) -> dict[int, float]:
        """Weights of the pass that visited these samples."""
        assert len(set(visited)) == len(visited), "a sample was visited twice"
        assert len(visited) == self.visits(), f"{len(visited)} visits instead of {self.visits()}"
        if not self.prunes():
            return dict.fromkeys(visited, 1.0)
        chance = prune_probability(self.scores, self.r, self.t, self.delta, self.num_passes)
        left_out = set(range(len(self.scores))) - set(visited)
        assert all(chance[index] > 0 for index in left_out), "a sample was skipped that is not well learned"
        return plan_weights(self.scores, visited)

    def finish(self, visited: Sequence[int], losses: Sequence[float]) -> None:
        """The pass is over: eq. 4."""
        self.scores = update_scores(self.scores, visited, losses)
        self.t += 1
