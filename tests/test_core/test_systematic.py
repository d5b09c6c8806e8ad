"""Draws with unequal chances: exact counts, exact chances, and what pairs of samples make of them."""

import itertools

import numpy as np
import pytest
import torch

from infobatch_mm.core import Chances
from infobatch_mm.core.chances import kept_count
from infobatch_mm.core.rng import generator
from infobatch_mm.core.systematic import ONE, in_units, proportional, systematic
from infobatch_mm.core.worth import cost, limit, worth


def drawn_slowly(units, order, start, one):
    """Madow's draw, sample by sample: the stretches in which a point start, start + one, ... lies."""
    end, drawn = 0, []
    for place in order:
        begin, end = end, end + units[place]
        first = (begin - start + one - 1) // one * one + start if begin > start else start
        if begin <= first < end:
            drawn.append(place)
    return drawn


@pytest.mark.parametrize("units", [[1, 2, 3, 2], [4, 1, 1, 2], [3, 3, 1, 1, 4], [1, 1, 1, 1]])
def test_every_start_and_order_together_give_exactly_the_chances(units):
    one = 4
    assert sum(units) % one == 0
    times = np.zeros(len(units), dtype=int)
    count = 0
    for order in itertools.permutations(range(len(units))):
        for start in range(one):
            drawn = drawn_slowly(units, order, start, one)
            assert len(drawn) == sum(units) // one
            times[drawn] += 1
            count += 1
    assert (times * one == np.array(units) * count).all()


@pytest.mark.parametrize("seed", range(20))
def test_the_draw_is_madows_with_the_order_and_the_start_that_the_generator_gives(seed):
    source = np.random.default_rng(seed)
    size = int(source.integers(2, 40))
    total = int(source.integers(1, size))
    units = in_units(proportional(source.random(size) ** 3, total, 0.0).clip(1e-9), total)
    assert units.sum() == total * ONE
    order = torch.randperm(size, generator=(known := generator(seed)), dtype=torch.int32).tolist()
    start = int(torch.randint(ONE, (), generator=known, dtype=torch.int64))
    drawn = systematic(units, generator(seed))
    assert drawn.tolist() == drawn_slowly(units.tolist(), order, start, ONE) and len(drawn) == total


def test_marginals_of_many_draws_are_the_chances():
    chances = np.array([0.1, 0.9, 0.35, 0.65, 0.5, 0.5, 0.77, 0.23])
    units = in_units(chances, 4)
    times, source, draws = np.zeros(8), generator(3), 100_000
    for _ in range(draws):
        times[systematic(units, source)] += 1
    error = np.sqrt(chances * (1 - chances) / draws)
    assert (abs(times / draws - chances) <= 4.5 * error).all()


@pytest.mark.parametrize("seed", range(30))
def test_chances_are_proportional_within_their_bounds(seed):
    source = np.random.default_rng(seed)
    size = int(source.integers(1, 200))
    sizes = source.lognormal(0, source.uniform(0, 3), size) * (source.random(size) > source.uniform(0, 0.5))
    lowest = source.choice([0.0, 0.05, 0.3])
    total = source.uniform(max(lowest, 1e-3) * size, size)
    chances = proportional(sizes, total, lowest)
    assert chances.sum() == pytest.approx(total, rel=1e-8)
    assert (chances >= lowest).all() and (chances <= 1 + 1e-12).all()
    free = (chances > lowest) & (chances < 1)
    free &= sizes > 0
    if free.sum() > 1:
        ratios = chances[free] / sizes[free]
        assert ratios.max() == pytest.approx(ratios.min(), rel=1e-9)
        capped, floored = chances >= 1, chances <= lowest
        assert not capped.any() or (ratios.min() * sizes[capped] >= 1 - 1e-9).all()
        assert not floored.any() or (ratios.max() * sizes[floored] <= lowest + 1e-9).all()
    assert len(set(chances[sizes == 0].tolist())) <= 1


@pytest.mark.parametrize("multiple_of", [1, 3, 8])
def test_counts_divide_and_weights_are_the_inverse_of_what_was_drawn_with(multiple_of):
    source = np.random.default_rng(multiple_of)
    for case in range(100):
        size = int(source.integers(1, 80))
        values = np.where(source.random(size) < 0.3, 1.0, source.uniform(0.1, 1.0, size))
        plan = Chances(torch.from_numpy(values), lowest=0.1).drawn(generator(case), multiple_of)
        if plan is None:
            continue
        assert len(plan) % multiple_of == 0 and len(plan.indices.unique()) == len(plan)
        assert (plan.weights[torch.from_numpy(values)[plan.indices] == 1] == 1).all()
        assert float(plan.weights.max()) <= 10 * (1 + 1e-6) and float(plan.weights.min()) >= 1


def test_unweighted_chances_of_0_and_1_choose_and_give_way_only_for_full_batches():
    values = torch.tensor([1.0] * 10 + [0.0] * 10)
    plan = Chances(values, weighted=False).drawn(generator(0), 5)
    assert plan is not None and sorted(plan.indices.tolist()) == list(range(10)) and (plan.weights == 1).all()
    plan = Chances(values, weighted=False, weight=1.25).drawn(generator(0), 4)
    assert plan is not None and len(plan) in (8, 12) and set(plan.indices.tolist()) <= set(range(10))
    assert (plan.weights == 1.25).all()
    mixed = torch.tensor([1.0] * 10 + [0.5] * 10)
    plan = Chances(mixed, weighted=False).drawn(generator(0), 5)
    assert plan is not None and len(plan) == 15 and set(range(10)) <= set(plan.indices.tolist())


def test_equal_chances_are_a_draw_without_replacement():
    values, pairs, draws = torch.full((5,), 0.4), np.zeros((5, 5)), 20_000
    for seed in range(draws):
        plan = Chances(values).drawn(generator(seed), 1)
        first, second = plan.indices.tolist()
        pairs[first, second] += 1
        assert plan.weights.tolist() == [2.5, 2.5]
    share = (pairs + pairs.T)[np.triu_indices(5, 1)] / draws
    assert (abs(share - 0.1) < 5 * np.sqrt(0.1 * 0.9 / draws)).all()
    assert kept_count(5, 0, 0.6, 1) == 2


def pair_bias(size):
    """How far the weights of pairs are off, relative, of a sum over all pairs, by many draws of unequal chances."""
    source = np.random.default_rng(0)
    norms = source.lognormal(0, 0.7, size)
    values = torch.from_numpy(proportional(norms, size / 2, 0.1))
    sums = []
    for seed in range(4000):
        plan = Chances(values).drawn(generator(seed, size), 1)
        order = torch.randperm(len(plan), generator=generator(seed))
        weights = plan.pair_weights(plan.weights, plan.weights[order])
        apart = order != torch.arange(len(plan))
        sums.append(float((weights[apart]).sum()))
    # A full pass makes (size - 1) pairs of different samples in expectation: one fixed point.
    return np.mean(sums) / (size - 1) - 1, np.std(sums) / (size - 1) / np.sqrt(len(sums))


def test_pair_weights_of_unequal_chances_are_off_by_one_over_the_visits():
    for size in (20, 80):
        bias, error = pair_bias(size)
        assert abs(bias) <= 2 / (size / 2) + 4 * error


def test_weights_with_a_mean_of_one_keep_their_proportions_and_their_pairs():
    values = torch.from_numpy(np.linspace(0.2, 1.0, 30))
    plan = Chances(values).drawn(generator(1), 2)
    step = plan.with_mean_weight_one()
    assert float(step.weights.mean()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(step.weights / step.scale, plan.weights)
    both = plan.pair_weights(plan.weights[:4], plan.weights[4:8])
    torch.testing.assert_close(step.pair_weights(step.weights[:4], step.weights[4:8]), both * step.scale)


def test_worth_of_random_pruning_is_its_cost_and_neymans_choice_is_worth_most():
    norms = np.random.default_rng(0).lognormal(0, 1, 1000)
    uniform = np.full(1000, 0.3)
    assert worth(norms, uniform) == pytest.approx(cost(uniform)) == pytest.approx(0.3)
    best = proportional(norms, 300, 1e-6)
    other = proportional(np.sqrt(norms), 300, 1e-6)
    assert worth(norms, best) > worth(norms, other) > 0.3
    few = proportional(norms, 2, 0.0)
    assert worth(norms, few) / cost(few) == pytest.approx(limit(norms), rel=1e-6)
    # InfoBatch: 1 / (1 + S r / (1-r)), S the share of the squared norms below the mean.
    below = norms < norms.mean()
    share = (norms[below] ** 2).sum() / (norms**2).sum()
    assert worth(norms, np.where(below, 0.5, 1.0)) == pytest.approx(1 / (1 + share))
