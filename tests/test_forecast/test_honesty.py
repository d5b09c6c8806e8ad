"""What a forecast says against what trainings do, on a quadratic whose gradients and best learning rates are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from infobatch_mm.core import Snapshot, build_policy
from infobatch_mm.core.rng import generator
from infobatch_mm.forecast.estimates import limits, noise_scales, resampled
from infobatch_mm.forecast.table import Row, at, cases, table

from .constructed import measured

#: Samples, weights, batch, saving of a pass, and trainings of each kind.
N, P, B, SAVING, RUNS = 10_000, 10, 8, 0.5, 200


class Quadratic:
    """Loss ``|x|**2 / 2``; the gradient of sample i is x and a vector of its own, of which all add up to nothing.

    Args:
        noise (float): Noise scale over batch size at the start.
        sizes (ndarray): What norms of the samples' vectors are in proportion to, shape ``(N,)``.
    """

    def __init__(self, noise: float, sizes: np.ndarray) -> None:
        directions = np.random.default_rng(0).normal(size=(N, P)) * sizes[:, None]
        directions -= directions.mean(0)
        self.own = directions / np.sqrt((directions**2).sum(1).mean())  # of mean squared norm 1
        self.start = np.full(P, np.sqrt(1 / (noise * B) / P))

    def gradients(self, x: np.ndarray, samples: np.ndarray) -> np.ndarray:
        return x + self.own[samples]

    def plan(self, seed: int, scores: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, float]:
        """Samples of a pass and their weights, in order, and the variance of a batch's gradient."""
        if scores is None:
            indices, weights = np.random.default_rng([seed, 1]).permutation(N), np.ones(N)
        else:
            policy = build_policy(dict(type="variance", prune_ratio=SAVING, rescale="step"))
            seen = torch.ones(N, dtype=torch.bool)
            snapshot = Snapshot(torch.from_numpy(scores.astype(np.float32)), seen, seen.to(torch.int32), 0.5)
            drawn = policy.plan(snapshot, generator(seed, 2), B)
            indices, weights = drawn.indices.numpy(), drawn.weights.numpy().astype(float)
        # By all samples' gradients, not by a forecast.
        return indices, weights, (weights**2 * (self.own[indices] ** 2).sum(1)).mean() / B

    def losses(self, seed: int, steps: int, scores: np.ndarray | None) -> np.ndarray:
        """Loss before each step and after the last, of one training at the best rate for its noise."""
        indices, weights, variance = self.plan(seed, scores)
        x, found = self.start.copy(), []
        for step in range(steps):
            found.append(x @ x / 2)
            here = slice(step * B, step * B + B)
            gradient = (weights[here, None] * self.gradients(x, indices[here])).mean(0)
            x = x - gradient / (1 + variance / (x @ x))
        return np.array([*found, x @ x / 2])

    def progress(self, scores: np.ndarray | None, plans: int = 20) -> float:
        """By how much one step from the start lowers the loss, in the mean over all batches of some plans."""
        found = []
        for seed in range(plans):
            indices, weights, variance = self.plan(seed, scores)
            gradients = weights[:, None] * self.gradients(self.start, indices)
            ends = self.start - gradients.reshape(-1, B, P).mean(1) / (1 + variance / (self.start @ self.start))
            found.append((self.start @ self.start - (ends**2).sum(1).mean()) / 2)
        return float(np.mean(found))


def foretold(problem: Quadratic, samples: int = 400) -> Row:
    """The row of draws by norm, from a few gradients at the start."""
    chosen = np.random.default_rng(1).permutation(N)[:samples]
    taken = measured(np.repeat(problem.gradients(problem.start, chosen)[:, None], 2, 1), num_samples=N)
    counts = resampled(samples, 0)
    limit, noises = limits(taken, counts), noise_scales(taken, counts) / B
    rows = table(taken, cases([SAVING]), float(limit[0]), noises, counts)
    return at(rows, policy="variance", way="norm")[0]


def equal_in_truth(problem: Quadratic, steps: int) -> float:
    """Share of the steps of an unpruned training at which it is where a pruned one ends."""
    scores = np.linalg.norm(problem.gradients(problem.start, np.arange(N)), axis=1)
    pruned_steps = round(steps * (1 - SAVING))
    pruned = np.mean([problem.losses(seed, pruned_steps, scores)[-1] for seed in range(RUNS)])
    full = np.mean([problem.losses(seed, steps, None) for seed in range(RUNS)], axis=0)
    return float(np.interp(-pruned, -full, np.arange(steps + 1) / steps))


MIXED = np.where(np.arange(N) % 5, 0.3, 3.0)
EQUAL = np.ones(N)


@pytest.mark.parametrize(
    ("noise", "sizes", "steps"),
    [(20.0, MIXED, 40), (0.02, MIXED, 8), (20.0, EQUAL, 40)],
    ids=["noise limits", "noise does not limit", "no sample is larger than another"],
)
def test_pruned_trainings_end_where_the_forecast_says(noise: float, sizes: np.ndarray, steps: int) -> None:
    problem = Quadratic(noise, sizes)
    told = foretold(problem).equal_length
    assert told.low - 0.05 < equal_in_truth(problem, steps) < told.high + 0.05


@pytest.mark.parametrize("noise", [5.0, 1.0, 0.3])
def test_a_step_gets_as_far_as_the_forecast_says(noise: float) -> None:
    problem = Quadratic(noise, MIXED)
    scores = np.linalg.norm(problem.gradients(problem.start, np.arange(N)), axis=1)
    found = (1 - SAVING) * problem.progress(scores) / problem.progress(None)
    told = foretold(problem).equal_length
    assert told.low - 0.05 < found < told.high + 0.05
    # What noise alone, or steps alone, would make of it is another number.
    assert min(abs(found - 0.5), abs(found - foretold(problem).worth.worth)) > 0.02
