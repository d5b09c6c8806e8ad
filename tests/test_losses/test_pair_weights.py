"""Pruned passes that mix samples are unbiased: every draw, order and permutation is counted, for any loss of a pair.

A full pass and a pruned one mix within batches, each sample with a random one of its batch. With the weights of
:meth:`Plan.pair_weights` the expected weighted sum over a pruned pass is the expected sum over a full one, whatever the
losses of pairs are; with simpler weights it is not.
"""

from itertools import combinations, permutations

import pytest
import torch

from infobatch_mm.core import Plan, full_plan, thinned_plan
from infobatch_mm.losses import LossWeigher

LAM = 0.7


def losses_of_pairs(num_samples, seed=0):
    """Losses of any kind: of (i, j) another than of (j, i), and of samples by themselves."""
    return torch.rand(num_samples, num_samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plans_of(num_samples, candidates, kept):
    """All plans that a draw of ``kept`` among the first ``candidates`` samples can give, but for their order."""
    others = range(candidates, num_samples)
    for drawn in combinations(range(candidates), kept):
        weights = [candidates / kept] * kept + [1.0] * len(others)
        yield Plan(torch.tensor([*drawn, *others]), torch.tensor(weights), pruned=kept < candidates)


# ---------------------------------------------------------------- rules for the weight of an image


def ours(plan, first, second):
    return plan.pair_weights(first, second)


def own_only(plan, first, second):
    return first


def by_shares(plan, first, second):
    return LAM * first + (1 - LAM) * second


def product(plan, first, second):
    return first * second


def mean_of_both(plan, first, second):
    return (first + second) / 2


NAIVE = [own_only, by_shares, product, mean_of_both]


def expected_weights(plan, num_samples, batch_size, rule, repeats=1):
    """Of each pair in a pass over the plan in random order, shape ``(N, N)``: all ordered batches, all permutations.

    In a random order each batch of a pass is a random one, so the pass has as many as its length gives. Repeated
    augmentation fills it with fewer samples, each as many times.
    """
    places = torch.tensor(list(permutations(range(len(plan)), batch_size // repeats))).repeat_interleave(repeats, 1)
    mixings = torch.tensor(list(permutations(range(batch_size))))
    first = places[:, None, :].expand(-1, len(mixings), -1)
    second = places[:, mixings]
    weights = rule(plan, plan.weights[first], plan.weights[second])
    weights = torch.where(first == second, plan.weights[first], weights)  # also of two visits of one sample
    pairs = plan.indices[first] * num_samples + plan.indices[second]
    total = torch.zeros(num_samples**2, dtype=torch.float64)
    total.index_add_(0, pairs.flatten(), weights.double().flatten())
    return total.view(num_samples, num_samples) / (len(places) * len(mixings)) * len(plan) / batch_size


def over_pruned_passes(num_samples, candidates, kept, batch_size, rule, repeats=1):
    plans = list(plans_of(num_samples, candidates, kept))
    return sum(expected_weights(plan, num_samples, batch_size, rule, repeats) for plan in plans) / len(plans)


def over_full_passes(num_samples, batch_size, repeats=1):
    whole = Plan(torch.arange(num_samples), torch.ones(num_samples), pruned=False)
    return expected_weights(whole, num_samples, batch_size, own_only, repeats)


#: Samples, candidates for pruning, how many of them are kept, batch size.
SETTINGS = [(6, 4, 2, 2), (6, 5, 2, 3), (8, 6, 2, 2), (8, 6, 4, 3), (8, 7, 5, 2), (9, 5, 2, 3)]
#: A policy may prune whatever it finds, without a look at scores.
ALL_CANDIDATES = [(6, 6, 3, 3), (6, 6, 2, 2), (6, 6, 5, 3)]


@pytest.mark.parametrize("setting", SETTINGS + ALL_CANDIDATES, ids=str)
def test_every_pair_has_the_expected_weight_that_it_has_in_a_full_pass(setting):
    """So has every sum over pairs, whatever their losses are."""
    num_samples, *_, batch_size = setting
    full = over_full_passes(num_samples, batch_size)
    assert float(full.sum()) == pytest.approx(num_samples) and bool((full > 0).all())
    torch.testing.assert_close(over_pruned_passes(*setting, ours), full, rtol=1e-6, atol=0)


@pytest.mark.parametrize("setting", [(8, 6, 2, 4), (6, 4, 2, 4), (8, 6, 4, 6)], ids=str)
def test_so_it_has_where_every_sample_is_visited_twice_in_a_row(setting):
    """Fewer samples meet, and samples meet themselves: both as often as in a full pass."""
    num_samples, *_, batch_size = setting
    full = over_full_passes(num_samples, batch_size, repeats=2)
    torch.testing.assert_close(over_pruned_passes(*setting, ours, repeats=2), full, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", NAIVE)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_simpler_weights_fail_the_same_test(setting, rule):
    num_samples, *_, batch_size = setting
    ratio = over_pruned_passes(*setting, rule) / over_full_passes(num_samples, batch_size)
    assert float((ratio - 1).abs().max()) > 0.1


@pytest.mark.parametrize("setting", ALL_CANDIDATES, ids=str)
def test_where_all_samples_weigh_alike_so_do_their_pairs(setting):
    """Then there is one right weight, and a product is not it."""
    num_samples, candidates, kept, batch_size = setting
    plan = next(plans_of(num_samples, candidates, kept))
    torch.testing.assert_close(plan.pair_weights(plan.weights, plan.weights), plan.weights, rtol=1e-6, atol=0)
    ratio = over_pruned_passes(*setting, product) / over_full_passes(num_samples, batch_size)
    assert float((ratio - 1).abs().max()) > 0.1


@pytest.mark.parametrize(("num_samples", "candidates"), [(5, 2), (6, 3), (8, 5)])
def test_with_one_candidate_left_all_pairs_that_can_meet_are_unbiased(num_samples, candidates):
    """Two candidates never do then; everything else is to be exact as ever."""
    meet = torch.ones(num_samples, num_samples, dtype=torch.bool)
    meet[:candidates, :candidates] = torch.eye(candidates, dtype=torch.bool)
    pruned, full = over_pruned_passes(num_samples, candidates, 1, 2, ours), over_full_passes(num_samples, 2)
    torch.testing.assert_close(pruned[meet], full[meet], rtol=1e-6, atol=0)


# ---------------------------------------------------------------- the same, as a model sees it


def sum_over_pass(plan, order, batch_size, losses, mixings):
    """The weighted sum that a weigher makes of a pass: the mean over all permutations of each batch."""
    weigher, total = LossWeigher(), 0.0
    for start in range(0, len(order), batch_size):
        places = torch.tensor(order[start : start + batch_size])
        samples, weights = plan.indices[places], plan.weights[places]
        for mixing in mixings:
            partners = torch.tensor(mixing)
            weigher.begin(weights, plan.pruned, samples, plan.pair_weights)
            weigher.mix(LAM * torch.eye(batch_size) + (1 - LAM) * torch.eye(batch_size)[partners])
            images = weigher.weights_on(torch.device("cpu"))
            weigher.end()
            total += float(images.double() @ losses[samples, samples[partners]]) / len(mixings)
    return total


@pytest.mark.parametrize(("num_samples", "candidates", "kept", "batch_size"), [(6, 4, 2, 2), (6, 5, 2, 3)])
def test_every_pass_that_there_is_gives_the_expected_sum(num_samples, candidates, kept, batch_size):
    """All draws in all orders, batch by batch, with the weigher that a model's losses ask."""
    losses, mixings = losses_of_pairs(num_samples), list(permutations(range(batch_size)))
    sums = [
        sum_over_pass(plan, order, batch_size, losses, mixings)
        for plan in plans_of(num_samples, candidates, kept)
        for order in permutations(range(len(plan)))
    ]
    full = float((over_full_passes(num_samples, batch_size) * losses).sum())
    assert sum(sums) / len(sums) == pytest.approx(full, rel=1e-6)
    assert max(sums) - min(sums) > 0.1 * full, "each pass is another one"


@pytest.mark.parametrize(("rule", "unbiased"), [(ours, True), *((rule, False) for rule in NAIVE)])
def test_drawn_plans_agree_within_their_error(rule, unbiased):
    """Plans as they are drawn, mixed at random: the mean over many, with its standard error."""
    num_samples, batch_size, passes = 24, 8, 3000
    generator = torch.Generator().manual_seed(1)
    candidates = torch.arange(num_samples) % 3 != 0
    losses = losses_of_pairs(num_samples)
    losses[candidates[:, None] & candidates] *= 20
    sums = {}
    for name in ("pruned", "full"):
        totals = []
        for _ in range(passes):
            plan = thinned_plan(candidates, 8, generator) if name == "pruned" else full_plan(num_samples, generator)
            samples, weights = plan.indices.view(-1, batch_size), plan.weights.view(-1, batch_size)
            partners = torch.rand(samples.shape, generator=generator).argsort(1)
            others = samples.gather(1, partners)
            images = rule(plan, weights, weights.gather(1, partners)) if name == "pruned" else weights
            images = torch.where(samples == others, weights, images)
            totals.append(float((images * losses[samples, others]).sum()))
        totals = torch.tensor(totals)
        sums[name] = float(totals.mean()), float(totals.std() / passes**0.5)
    difference = abs(sums["pruned"][0] - sums["full"][0])
    error = (sums["pruned"][1] ** 2 + sums["full"][1] ** 2) ** 0.5
    assert error < 0.01 * sums["full"][0]
    assert (difference < 4 * error) if unbiased else (difference > 8 * error)


# ---------------------------------------------------------------- weights of one, and of no pruning


@pytest.mark.parametrize("num_samples", [1, 2, 7])
def test_a_full_pass_has_weights_of_one(num_samples):
    plan = full_plan(num_samples, torch.Generator().manual_seed(0))
    ones = torch.ones(num_samples)
    assert torch.equal(plan.pair_weights(ones, ones), ones)


def test_a_plan_that_is_not_rescaled_has_weights_of_one():
    """A policy may leave the weights at one: then pairs have them too."""
    plan = Plan(torch.tensor([4, 1, 2]), torch.ones(3), pruned=True)
    ones = torch.ones(2, 3)
    assert torch.equal(plan.pair_weights(ones, ones), ones)


def test_weights_of_pairs_have_the_shape_and_kind_of_their_samples():
    plan = next(plans_of(8, 6, 3))
    first, second = torch.rand(2, 3), torch.rand(2, 3)
    both = plan.pair_weights(first, second)
    assert both.shape == (2, 3) and both.dtype == torch.float32
    assert torch.equal(both, plan.pair_weights(second, first))
    assert not plan.pair_weights(torch.zeros(3), torch.tensor([1.0, 2.0, 0.0])).any()


def test_a_plan_of_one_visit_pairs_nobody():
    plan = Plan(torch.tensor([3]), torch.tensor([6.0]), pruned=True)
    assert plan.pair_weights(plan.weights, plan.weights).isfinite().all()
