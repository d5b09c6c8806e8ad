"""Policies: when they prune, what they refuse."""

from __future__ import annotations

import math
import random

import pytest
import torch
from reference import kept_count as slow_kept_count
from reference import pruned_passes

from infobatch_mm.core import EpochSchedule, PruningPolicy, build_policy
from infobatch_mm.core.chances import kept_count
from infobatch_mm.policies import InfoBatchPolicy, NoPruning


def active_passes(delta: float, num_passes: int) -> list[int]:
    policy, schedule = InfoBatchPolicy(0.5, delta), EpochSchedule(10, num_passes, 1)
    return [p for p in range(num_passes) if policy.is_active(schedule.progress(p))]


@pytest.mark.parametrize(
    ("delta", "num_passes", "expected"),
    [
        (0.7, 10, 7),
        (0.875, 8, 7),
        (0.875, 10, 9),  # 8.75: pass 8 starts before it
        (1.0, 5, 5),
        (1, 1, 1),
        (0.5, 1, 1),
        (0.1, 30, 3),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.3, 10, 3),
        (0.6, 5, 3),
        (0.01, 10, 1),
    ],
)
def test_pruning_stops_after_delta_of_the_passes(delta: float, num_passes: int, expected: int):
    assert active_passes(delta, num_passes) == list(range(expected))


@pytest.mark.parametrize("num_passes", [1, 2, 3, 7, 10, 12, 30, 50, 90, 100, 160, 200, 300, 333, 1000])
def test_annealing_agrees_with_exact_fractions(num_passes: int):
    for percent in (1, 7, 14, 28, 29, 30, 33.3, 50, 57, 58, 60, 70, 80, 87.5, 90, 99, 100):
        delta = float(f"{percent / 100:.4g}")
        assert active_passes(delta, num_passes) == list(range(pruned_passes(delta, num_passes))), delta


def test_ratio_zero_is_never_active():
    assert not any(InfoBatchPolicy(0, 1.0).is_active(p / 10) for p in range(10))


def test_no_pruning_is_never_active_and_draws_nothing():
    policy = NoPruning()
    assert not any(policy.is_active(p / 10) for p in range(10))
    assert policy.draw(torch.rand(9), torch.ones(9, dtype=torch.bool), torch.Generator(), 1) is None
    assert policy.settings() == {"policy": "none"}


BAD = [1.5, -0.1, 1.0, float("nan"), float("inf"), float("-inf"), True, False, "0.5", None]


@pytest.mark.parametrize("value", BAD, ids=repr)
def test_bad_prune_ratio_is_refused_with_the_value(value: object):
    with pytest.raises(ValueError) as refused:
        InfoBatchPolicy(value)
    assert repr(value) in str(refused.value)
    assert "prune_ratio" in str(refused.value)


@pytest.mark.parametrize("value", [0, 0.0, 1.1, -0.1, 1.5, float("nan"), float("inf"), True, "0.5", None], ids=repr)
def test_bad_delta_is_refused_with_the_value(value: object):
    with pytest.raises(ValueError) as refused:
        InfoBatchPolicy(0.5, value)
    assert repr(value) in str(refused.value)
    assert "delta" in str(refused.value)


@pytest.mark.parametrize(("ratio", "delta"), [(0, 1), (0.0, 1e-6), (0.999, 1.0), (0.5, 0.875)])
def test_edges_of_the_ranges_are_taken(ratio: float, delta: float):
    assert InfoBatchPolicy(ratio, delta).settings() == {"policy": "infobatch", "prune_ratio": ratio, "delta": delta}


def test_defaults_are_those_of_the_paper():
    assert InfoBatchPolicy().settings() == {"policy": "infobatch", "prune_ratio": 0.5, "delta": 0.875}


@pytest.mark.parametrize("name", ["nonesuch", "", "InfoBatch", None])
def test_unknown_policy_is_refused_with_its_name_and_the_choices(name: object):
    with pytest.raises(ValueError) as refused:
        build_policy(name)
    assert repr(name) in str(refused.value)
    assert "infobatch" in str(refused.value) and "none" in str(refused.value)


def test_build_policy_passes_its_arguments_on():
    built = build_policy("infobatch", 0.3, 0.6)
    assert isinstance(built, InfoBatchPolicy)
    assert (built.prune_ratio, built.delta) == (0.3, 0.6)
    assert isinstance(build_policy("none"), NoPruning)


@pytest.mark.parametrize("policy", ["none", "infobatch", NoPruning()])
def test_bad_arguments_are_refused_whatever_the_policy(policy: str | PruningPolicy):
    with pytest.raises(ValueError, match=r"1\.5"):
        build_policy(policy, 1.5)
    with pytest.raises(ValueError, match=r"1\.1"):
        build_policy(policy, 0.5, 1.1)


def test_own_policy_is_taken_as_it_is():
    policy = InfoBatchPolicy(0.2, 0.3)
    assert build_policy(policy) is policy


def test_kept_count_agrees_with_a_search_over_all_counts():
    rng = random.Random(0)
    for _ in range(1500):
        n, others, m = rng.randint(0, 60), rng.randint(0, 60), rng.randint(1, 40)
        r = rng.choice([0.01, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 0.99, rng.uniform(0.01, 0.99)])
        assert kept_count(n, others, r, m) == slow_kept_count(n, others, r, m), (n, others, r, m)


def test_kept_count_is_near_its_target_where_enough_samples_exist():
    rng = random.Random(1)
    for _ in range(500):
        m = rng.randint(1, 32)
        n, others, r = rng.randint(4 * m, 400), rng.randint(0, 200), rng.uniform(0.3, 0.7)
        k = kept_count(n, others, r, m)
        assert (others + k) % m == 0
        assert abs(k - (1 - r) * n) <= m / 2 + 1e-6
        assert math.isfinite(n / k)


# ---- by quantile ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.01, 0.25, 0.5, 0.76, 1])
@pytest.mark.parametrize("ties", [False, True])
def test_a_quantile_makes_exactly_so_many_candidates_whatever_the_scores(quantile: float, ties: bool):
    rng = random.Random(3)
    scores = torch.tensor([rng.choice([0.0, 1.0]) if ties else rng.random() ** 8 for _ in range(400)])
    seen = torch.tensor([rng.random() < 0.8 for _ in range(400)])
    policy = InfoBatchPolicy(0.5, quantile=quantile)
    plan = policy.draw(scores, seen, torch.Generator().manual_seed(0), 1)
    count = round(quantile * int(seen.sum()))
    weights = dict(zip(plan.indices.tolist(), plan.weights.tolist(), strict=True))
    kept = slow_kept_count(count, 400 - count, 0.5, 1)
    assert len(plan) == 400 - count + kept
    thinned = [i for i in range(400) if weights.get(i) != 1]
    assert len([i for i in thinned if i in weights]) == kept
    assert {round(weights[i], 5) for i in thinned if i in weights} == {round(count / kept, 5)}
    ranked = sorted(scores[seen].tolist())
    assert all(seen[i] for i in thinned)
    assert max(scores[i].item() for i in thinned) <= ranked[count - 1]
    assert plan.threshold == (None if quantile == 1 else pytest.approx(ranked[count]))


def test_a_quantile_of_less_than_one_sample_prunes_nothing():
    assert InfoBatchPolicy(quantile=0.01).draw(torch.rand(20), torch.ones(20).bool(), torch.Generator(), 1) is None


@pytest.mark.parametrize("quantile", [0, 1.5, -0.1, float("nan"), True, "0.5"])
def test_a_quantile_out_of_range_is_refused_with_the_value(quantile: object):
    with pytest.raises(ValueError, match=rf"quantile={quantile!r}"):
        build_policy("infobatch", quantile=quantile)  # type: ignore[arg-type]


def test_a_quantile_identifies_its_policy_and_the_papers_has_none():
    assert build_policy("infobatch", 0.4, 0.8, 0.7).settings() == {
        "policy": "infobatch", "prune_ratio": 0.4, "delta": 0.8, "quantile": 0.7
    }  # fmt: skip
    assert "quantile" not in InfoBatchPolicy().settings()
    assert "quantile" not in build_policy("random", quantile=0.7).settings()
