"""Plans: exact counts, exact weights, uniform draws."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from reference import expected_rescaled_sum, kept_count, mean_score, plan_weights

from infobatch_mm.core import Plan, full_plan, thinned_plan
from infobatch_mm.policies import InfoBatchPolicy


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_scores(num_samples: int, seed: int, unseen: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Skewed scores, as losses are; the first ``unseen`` samples of a random order have none."""
    source = generator(1000 + seed)
    scores = torch.rand(num_samples, generator=source).pow(3) * 4
    seen = torch.ones(num_samples, dtype=torch.bool)
    seen[torch.randperm(num_samples, generator=source)[:unseen]] = False
    scores[~seen] = 0
    return scores, seen


def as_list(scores: torch.Tensor, seen: torch.Tensor) -> list[float | None]:
    return [score if known else None for score, known in zip(scores.tolist(), seen.tolist(), strict=True)]


def draw(scores: torch.Tensor, seen: torch.Tensor, seed: int = 0, r: float = 0.5, m: int = 1):
    return InfoBatchPolicy(r, 1.0).draw(scores, seen, generator(seed), m)


# ---- full and thinned plans ---------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
def test_full_plan_visits_every_sample_once_with_weight_one(shuffle: bool):
    plan = full_plan(17, generator())
    plan = plan if shuffle else plan.sorted()
    assert sorted(plan.indices.tolist()) == list(range(17))
    assert (plan.indices.tolist() == list(range(17))) is not shuffle
    assert plan.weights.tolist() == [1.0] * 17
    assert (plan.indices.dtype, plan.weights.dtype) == (torch.int64, torch.float32)
    assert not plan.pruned and plan.threshold is None and len(plan) == 17


@pytest.mark.parametrize("num_kept", range(1, 8))
def test_thinned_plan_keeps_exactly_k_and_weighs_them_n_over_k(num_kept: int):
    candidates = torch.zeros(20, dtype=torch.bool)
    candidates[[0, 3, 4, 9, 15, 18, 19]] = True
    plan = thinned_plan(candidates, num_kept, generator(num_kept), threshold=0.5)
    assert plan.indices.dtype == torch.int64
    assert len(plan) == 13 + num_kept == len(set(plan.indices.tolist()))
    assert set(range(20)) - set(plan.indices.tolist()) <= {0, 3, 4, 9, 15, 18, 19}
    kept = candidates[plan.indices]
    assert int(kept.sum()) == num_kept
    assert torch.equal(plan.weights[kept], torch.full((num_kept,), 7 / num_kept))
    assert torch.equal(plan.weights[~kept], torch.ones(13))
    assert plan.pruned is (num_kept < 7)
    assert plan.threshold == 0.5


def test_first_cuts_order_and_weights_alike():
    plan = thinned_plan(torch.arange(10) < 6, 3, generator(), threshold=2.0)
    head = plan.first(4)
    assert head.indices.tolist() == plan.indices[:4].tolist()
    assert head.weights.tolist() == plan.weights[:4].tolist()
    assert (head.pruned, head.threshold) == (True, 2.0)
    assert len(plan.first(100)) == len(plan) == 7


def test_first_does_not_hold_on_to_the_whole_plan():
    plan = full_plan(1000, generator())
    assert plan.first(10).indices.untyped_storage().nbytes() == 80


# ---- the draw -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unseen", [0, 7])
@pytest.mark.parametrize("r", [0.1, 0.3, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("m", [1, 2, 8, 16])
def test_draw_agrees_with_the_reference(r: float, m: int, unseen: int):
    for seed in range(10):
        num_samples = 40 + 3 * seed
        scores, seen = random_scores(num_samples, seed, unseen)
        known = as_list(scores, seen)
        candidates = [i for i, s in enumerate(known) if s is not None and s < mean_score(known)]
        k = kept_count(len(candidates), num_samples - len(candidates), r, m)
        plan = draw(scores, seen, seed, r, m)
        if k == len(candidates):
            assert plan is None
            continue
        visited = plan.indices.tolist()
        assert len(set(visited)) == len(visited) == num_samples - len(candidates) + k
        assert set(range(num_samples)) - set(visited) <= set(candidates)
        expected = plan_weights(known, visited)
        assert torch.equal(plan.weights, torch.tensor([expected[i] for i in visited]))
        assert plan.threshold == pytest.approx(mean_score(known), rel=1e-12)


def test_weights_sum_to_the_number_of_samples():
    for seed in range(50):
        scores, seen = random_scores(30 + 7 * seed, seed)
        plan = draw(scores, seen, seed, r=0.05 + 0.018 * seed)
        assert float(plan.weights.double().sum()) == pytest.approx(len(scores), rel=1e-6)


def test_visits_divide_or_the_pass_is_full():
    full = 0
    for seed in range(200):
        num_samples, m = 5 + seed % 40, 1 + seed % 23
        scores, seen = random_scores(num_samples, seed)
        plan = draw(scores, seen, seed, r=0.5, m=m)
        if plan is None:
            full += 1
            candidates = int((scores < scores.double().mean()).sum())
            dividing = [k for k in range(1, candidates) if (num_samples - candidates + k) % m == 0]
            assert kept_count(candidates, num_samples - candidates, 0.5, m) == candidates, dividing
        else:
            assert len(plan) % m == 0
            assert plan.pruned
    assert 0 < full < 200


def test_single_well_learned_sample_is_never_lost():
    # The reference code draws int(0.5 * 1) = 0 of it and compensates for nothing.
    scores = torch.tensor([0.0, 1.0, 1.0, 1.0])
    for seed in range(20):
        assert draw(scores, torch.ones(4, dtype=torch.bool), seed) is None


def test_rescaled_sum_is_unbiased_over_all_draws():
    losses = [0.3, 2.5, 0.1, 0.7, 1.9, 0.2, 3.0]
    for k in range(1, 5):
        assert expected_rescaled_sum(losses, [0, 2, 3, 5], k) == pytest.approx(sum(losses), rel=1e-12)


@pytest.mark.parametrize(("r", "m"), [(0.5, 1), (0.7, 1), (0.3, 8)])
def test_rescaled_sum_is_unbiased(r: float, m: int):
    scores, seen = random_scores(48, 3, unseen=5)
    values = torch.randn(48, generator=generator(77)).double()  # what is summed has nothing to do with the score
    draws = 3000
    sums = torch.empty(draws, dtype=torch.float64)
    for seed in range(draws):
        plan = draw(scores, seen, seed, r, m)
        sums[seed] = (plan.weights.double() * values[plan.indices]).sum()
    standard_error = float(sums.std()) / math.sqrt(draws)
    assert standard_error > 0
    assert abs(float(sums.mean() - values.sum())) < 4 * standard_error


@pytest.mark.parametrize(("r", "m"), [(0.5, 1), (0.7, 4)])
def test_every_well_learned_sample_is_included_with_probability_k_over_n(r: float, m: int):
    scores, seen = random_scores(40, 5, unseen=4)
    candidates = (scores < scores[seen].double().mean()) & seen
    n = int(candidates.sum())
    k = kept_count(n, 40 - n, r, m)
    draws, counts = 3000, torch.zeros(40)
    for seed in range(draws):
        counts[draw(scores, seen, seed, r, m).indices] += 1
    assert counts[~candidates].tolist() == [draws] * (40 - n)
    p = k / n
    assert (counts[candidates] / draws - p).abs().max() < 4.5 * math.sqrt(p * (1 - p) / draws)


def test_order_is_a_uniform_shuffle_of_a_uniform_draw():
    # 3 candidates of which 2 are kept, 2 others: 3 subsets times 4! orders, all equally likely.
    candidates = torch.tensor([True, False, True, True, False])
    draws = 7200
    outcomes = Counter(tuple(thinned_plan(candidates, 2, generator(s)).indices.tolist()) for s in range(draws))
    assert len(outcomes) == 72
    chi2 = sum((count - 100) ** 2 / 100 for count in outcomes.values())
    assert chi2 < 71 + 5 * math.sqrt(2 * 71)


def test_kept_well_learned_samples_are_spread_over_the_whole_pass():
    scores, seen = random_scores(60, 4)
    draws, places = 1000, []
    for seed in range(draws):
        plan = draw(scores, seen, seed)
        heavy = (plan.weights > 1).nonzero().squeeze(1).double()
        places.append(float(heavy.mean()) / (len(plan) - 1))
    standard_error = float(torch.tensor(places).std()) / math.sqrt(draws)
    assert abs(sum(places) / draws - 0.5) < 4 * standard_error


def test_every_part_of_a_pass_is_unbiased():
    # Iteration loops cut their last pass by Plan.first: a random part, whose sum is that share of the full sum.
    scores, seen = random_scores(60, 4)
    values = torch.rand(60, generator=generator(78)).double()
    draws, visits = 2000, len(draw(scores, seen))
    part = visits // 2
    sums = torch.empty(draws, dtype=torch.float64)
    for seed in range(draws):
        plan = draw(scores, seen, seed).first(part)
        sums[seed] = (plan.weights.double() * values[plan.indices]).sum()
    standard_error = float(sums.std()) / math.sqrt(draws)
    assert abs(float(sums.mean()) - part / visits * float(values.sum())) < 4 * standard_error


def test_full_order_is_a_uniform_shuffle():
    draws = 4800
    outcomes = Counter(tuple(full_plan(4, generator(s)).indices.tolist()) for s in range(draws))
    assert len(outcomes) == 24
    chi2 = sum((count - 200) ** 2 / 200 for count in outcomes.values())
    assert chi2 < 23 + 5 * math.sqrt(2 * 23)


def test_without_shuffle_visits_are_sorted_and_the_draw_stays_uniform():
    scores, seen = random_scores(30, 8)
    candidates = scores < scores.double().mean()
    counts = torch.zeros(30)
    for seed in range(2000):
        plan = draw(scores, seen, seed).sorted()
        visited = plan.indices.tolist()
        assert visited == sorted(visited)
        assert torch.equal(plan.weights > 1, candidates[plan.indices])
        counts[plan.indices] += 1
    n = int(candidates.sum())
    p = kept_count(n, 30 - n, 0.5, 1) / n
    assert (counts[candidates] / 2000 - p).abs().max() < 4.5 * math.sqrt(p * (1 - p) / 2000)


# ---- unseen samples -----------------------------------------------------------------------------------


def test_unseen_samples_are_never_pruned_and_weigh_one():
    scores, seen = random_scores(40, 2, unseen=15)
    unseen = set((~seen).nonzero().squeeze(1).tolist())
    for seed in range(100):
        plan = draw(scores, seen, seed, r=0.9)
        assert unseen <= set(plan.indices.tolist())
        assert (plan.weights[~seen[plan.indices]] == 1).all()


def test_unseen_samples_take_no_part_in_the_threshold():
    # With zeros (or the reference code's 3.0) in the mean, 2.0 would be on the other side of it.
    scores = torch.tensor([1.0, 2.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    plan = draw(scores, torch.tensor([True] * 3 + [False] * 5))
    assert plan.threshold == pytest.approx(7 / 3)
    assert len(plan) == 7


@pytest.mark.parametrize("filler", [3.0, -1.0, float("nan"), float("inf")])
def test_what_stands_where_there_is_no_score_does_not_matter(filler: float):
    # PruningPolicy.draw promises scores that are "finite where seen"; elsewhere they mean nothing.
    scores = torch.tensor([1.0, 2.0, 4.0, filler, filler])
    seen = torch.tensor([True, True, True, False, False])
    plan = draw(scores, seen)
    assert plan is not None
    assert plan.threshold == pytest.approx(7 / 3)
    assert {2, 3, 4} <= set(plan.indices.tolist())


def test_nothing_seen_prunes_nothing():
    assert draw(torch.zeros(8), torch.zeros(8, dtype=torch.bool)) is None


# ---- cases in which nothing is pruned -------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 2.302585, 1e-30, 1e30])
@pytest.mark.parametrize("num_samples", [1, 3, 10, 1001])
def test_equal_scores_prune_nothing(value: float, num_samples: int):
    # The reference code's initial 0.1 is below its own mean by rounding.
    scores = torch.full((num_samples,), value)
    assert draw(scores, torch.ones(num_samples, dtype=torch.bool)) is None


@pytest.mark.parametrize("m", [1, 4, 7])
def test_ratio_zero_never_prunes(m: int):
    for seed in range(20):
        scores, seen = random_scores(30, seed)
        assert draw(scores, seen, seed, r=0.0, m=m) is None


# ---- randomness -----------------------------------------------------------------------------------------


def test_draw_is_determined_by_the_generator_state():
    scores, seen = random_scores(60, 1)
    source = generator(5)
    first = InfoBatchPolicy(0.5, 1.0).draw(scores, seen, source, 1)
    second = InfoBatchPolicy(0.5, 1.0).draw(scores, seen, source, 1)
    again = draw(scores, seen, seed=5)
    assert torch.equal(first.indices, again.indices) and torch.equal(first.weights, again.weights)
    assert not torch.equal(first.indices, second.indices)
    assert not torch.equal(first.indices, draw(scores, seen, seed=6).indices)


def test_draw_leaves_scores_alone():
    scores, seen = random_scores(60, 1, unseen=5)
    before = scores.clone(), seen.clone()
    draw(scores, seen)
    assert torch.equal(scores, before[0]) and torch.equal(seen, before[1])


def test_plan_is_immutable():
    plan = full_plan(3, generator())
    with pytest.raises(AttributeError):
        plan.indices = torch.arange(3)
    assert isinstance(plan, Plan)
