"""Gradients of single samples: against gradients that torch.func takes of all samples at once."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from infobatch_mm.core import rng
from infobatch_mm.forecast.gradients import Look, _sketch, choose, measure


class Regression:
    """Points on a plane with noise of their own in each visit, a small network, and a loss."""

    def __init__(self, num_samples: int = 12, broken: tuple[int, ...] = ()) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        self.x = torch.randn(num_samples, 3)
        self.y = self.x.sum(1, keepdim=True) + torch.rand(num_samples, 1)
        self.x[list(broken)] = float("nan")
        self.num_samples, self.batch_size = num_samples, 4
        self.remarks: list[str] = []

    def visited(self, index: int, key: tuple[int, ...]) -> Tensor:
        with rng.seeded(key):
            return self.x[index] + 0.1 * torch.randn(3)

    def look(self, index: int, key: tuple[int, ...]) -> Look:
        loss = (self.model(self.visited(index, key)[None]) - self.y[index]).square().mean()
        loss.backward()
        return Look(loss.item(), float("nan"))


def by_vmap(subject: Regression, indices: np.ndarray, seed: int) -> np.ndarray:
    """The gradient of each visit, shape ``(n, 2, P)``."""
    weights = {name: each.detach() for name, each in subject.model.named_parameters()}
    model = copy.deepcopy(subject.model).to("meta")

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (torch.func.functional_call(model, weights, (x[None],)) - y).square().mean()

    views = []
    for view in range(2):
        x = torch.stack([subject.visited(int(i), (seed, int(i), view)) for i in indices])
        found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, subject.y[indices])
        views.append(torch.cat([each.flatten(1) for each in found.values()], 1))
    return torch.stack(views, 1).double().numpy()


def test_gradients_are_each_samples_own() -> None:
    subject = Regression()
    indices = choose(12, 9, seed=3)
    found, true = measure(subject, indices, seed=3), by_vmap(subject, indices, 3)
    assert list(found.indices) == list(indices) and len(set(indices.tolist())) == 9 and found.num_samples == 12
    np.testing.assert_allclose(found.squares, (true**2).sum(2), rtol=1e-4)
    np.testing.assert_allclose(found.inner, (true[:, 0] * true[:, 1]).sum(1), rtol=1e-4)
    np.testing.assert_allclose(found.own_squares, (true.sum(1) ** 2).sum(1), rtol=1e-4)
    assert found.square_of_sum == pytest.approx((true.sum((0, 1)) ** 2).sum(), rel=1e-4)
    # Of so few weights a sketch is the gradient itself, but for signs.
    np.testing.assert_allclose(found.sketches @ found.sketches.T, true.sum(1) @ true.sum(1).T, rtol=1e-3, atol=1e-5)
    assert set(found.scores) == {"loss"}  # it has no last layer that anybody named


def test_nothing_global_changes() -> None:
    subject = Regression()
    before, weights = torch.get_rng_state(), copy.deepcopy(subject.model.state_dict())
    legacy = np.random.get_state()[1].copy()
    measure(subject, choose(12, 8, seed=0))
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == legacy).all()
    assert all(torch.equal(each, weights[name]) for name, each in subject.model.state_dict().items())
    assert all(each.grad is None for each in subject.model.parameters())


def test_sketches_keep_inner_products() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 100_003, generator=generator) + 0.5
    signs = torch.randint(0, 2, (100_003,), generator=generator, dtype=torch.int8) * 2 - 1
    sketches = np.stack([_sketch(each, signs) for each in vectors])
    assert sketches.shape == (2, 4096)
    np.testing.assert_allclose(sketches @ sketches.T, (vectors @ vectors.T).numpy(), rtol=0.1)


def test_samples_without_a_gradient_are_left_out_and_counted() -> None:
    found = measure(Regression(broken=(2, 5)), range(12))
    assert found.left_out == 2 and list(found.indices) == [0, 1, 3, 4, 6, 7, 8, 9, 10, 11]
    with pytest.raises(ValueError, match="7 of 12 samples have a finite gradient, and 8 are needed"):
        measure(Regression(broken=(2, 5, 6, 7, 8)), range(12))


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="--samples 3: gradients of 8 samples"):
        choose(100, 3, 0)
    with pytest.raises(ValueError, match="a data set of 5 samples: gradients of 8"):
        choose(5, 100, 0)
    assert sorted(choose(20, 100, 0)) == list(range(20))
