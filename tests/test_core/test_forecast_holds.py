"""The forecast against trainings: quadratics whose gradients are known, SGD, every arm at its own best learning rate.

Of a pruned training it says how long an unpruned one is that comes as far. Both are trained here: the pruned one once,
the unpruned one at many lengths, and the length is read off where their losses meet.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from infobatch_mm.core import EpochSchedule, Pruner, build_policy
from infobatch_mm.core.worth import equal_length

N, BATCH, PASSES, SEEDS = 4000, 20, 4, range(8)
CURVATURES = np.geomspace(0.05, 1.0, 24)
RATES = np.geomspace(2**-8, 2, 37)


class Steady:
    """Gradients ``Hx + s_i z_i`` whose noise shrinks with the gradient, so that the noise scale stays the same.

    The z_i are random directions with the covariance ``c (G'HG) H^-1 / D`` of a noise scale c (McCandlish et al., 2018,
    eq. 2.8, ``tr(H cov) / G'HG``), G the gradient; the s_i, by which samples differ, have a mean square of 1.

    Args:
        noise (float): The noise scale c, in samples.
        spread (float): Standard deviation of the logarithm of s.
    """

    def __init__(self, noise: float, spread: float) -> None:
        source = np.random.default_rng(0)
        scales = np.exp(spread * source.standard_normal(N))
        scales /= np.sqrt((scales**2).mean())
        directions = scales[:, None] * source.standard_normal((N, len(CURVATURES)))
        self.directions = (directions - directions.mean(0)) / np.sqrt(len(CURVATURES))
        self.noise = noise
        self.norms = np.sqrt(1 + noise * scales**2)

    def losses(self, batches: list[np.ndarray], weights: list[np.ndarray], lengths: np.ndarray) -> np.ndarray:
        """Logarithm of the loss after each share of the steps, for each of :data:`RATES`, shape ``(L, R)``."""
        x = np.ones((len(RATES), len(CURVATURES)))
        at = {round(length * len(batches)): place for place, length in enumerate(lengths)}
        found = np.full((len(lengths), len(RATES)), np.inf)
        with np.errstate(all="ignore"):
            for step, (indices, gamma) in enumerate(zip(batches, weights, strict=True), 1):
                size = np.sqrt(self.noise * (x**2 @ CURVATURES**3))[:, None]
                noise = gamma @ self.directions[indices] / len(indices) / np.sqrt(CURVATURES)
                x = x - RATES[:, None] * (gamma.mean() * x * CURVATURES + size * noise)
                if step in at:
                    loss = (x**2 @ CURVATURES) / 2
                    found[at[step]] = np.where(np.isfinite(loss), np.log(loss), np.inf)
        return found


def plans(norms: np.ndarray, policy: dict[str, object], passes: int, seed: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Batches and weights of a whole training by the project's own plans, scores being the norms."""
    pruner = known(norms, policy, passes, seed)
    for _ in range(passes):
        plan = pruner.begin_pass()
        for indices, weights in zip(plan.indices.split(BATCH), plan.weights.split(BATCH), strict=True):
            yield indices.numpy(), weights.numpy().astype(np.float64)
        pruner.advance(len(plan))
        pruner.finish_pass()


def known(norms: np.ndarray, policy: dict[str, object], passes: int = PASSES, seed: int = 0) -> Pruner:
    pruner = Pruner(EpochSchedule(N, passes, BATCH), build_policy(policy), seed=seed, score="raw")
    pruner.record(torch.arange(N), torch.from_numpy(norms.astype(np.float32)))
    pruner.store.flush()
    return pruner


def curve(problem: Steady, policy: dict[str, object], lengths: np.ndarray, passes: int = PASSES) -> np.ndarray:
    """Mean over seeds of the logarithm of the loss after each length, at the best rate for it, shape ``(L,)``."""
    every = []
    for seed in SEEDS:
        batches, weights = zip(*plans(problem.norms, policy, passes, seed), strict=True)
        every.append(problem.losses(list(batches), list(weights), lengths))
    return np.mean(every, axis=0).min(axis=1)


@pytest.mark.parametrize(
    ("noise", "spread", "within"),
    [
        pytest.param(1.0, 1.0, 0.04, id="noise does not limit"),
        pytest.param(80.0, 1.0, 0.08, id="noise limits"),
        pytest.param(320.0, 1.5, 0.08, id="noise alone limits"),
        pytest.param(20.0, 1.0, 0.14, id="in between", marks=pytest.mark.slow),
    ],
)
def test_a_pruned_training_comes_as_far_as_a_shorter_one_of_the_forecast_length(
    noise: float, spread: float, within: float
) -> None:
    problem = Steady(noise, spread)
    longest = PASSES + 1  # it may come farther than the full one, by luck
    lengths = np.linspace(0.2, 1.0, 41)
    unpruned = -curve(problem, dict(type="none"), lengths, longest)
    found, told = {}, {}
    for name in ("variance", "infobatch", "random"):
        policy = dict(type=name, delta=1.0, prune_ratio=0.5)
        worth = known(problem.norms, policy).begin_pass().worth
        assert worth is not None
        told[name] = equal_length(worth, noise / BATCH), worth.cost
        found[name] = float(np.interp(-curve(problem, policy, np.ones(1))[0], unpruned, lengths * longest / PASSES))
    print(noise, spread, found, told)
    for name, (forecast, cost) in told.items():
        assert found[name] == pytest.approx(forecast, abs=within), name
        if noise <= 1:
            assert found[name] == pytest.approx(cost, abs=0.03), name  # whatever it draws
    if noise > 20:
        assert found["variance"] > told["variance"][1] + 0.15 > found["random"] + 0.1
