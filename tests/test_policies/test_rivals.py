"""Published policies that do not weigh, each told slowly by its formula, in plain Python."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from infobatch_mm.core import EpochSchedule, Pruner, Snapshot, build_policy
from infobatch_mm.core.rng import generator
from infobatch_mm.policies.groups import groups_of

from .cases import SEEDS, Case, close


@pytest.fixture(params=SEEDS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


# ---- the highest scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_epsilon_greedy(case: Case, ratio: float):
    epsilon = 0.2
    visits = max(0.0, len(case.where) - ratio * case.size)
    top = case.ranked()[::-1][: round((1 - epsilon) * visits)]
    rest = [i for i in case.where if i not in top]
    expected = [1.0] * case.size
    for i in rest:
        expected[i] = (visits - len(top)) / len(rest)
    found = case.chances(dict(type="epsilon_greedy", prune_ratio=ratio, epsilon=epsilon))
    assert close(found, [max(0.0, chance) for chance in expected])


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_ucb(case: Case, ratio: float):
    visits = round(max(0.0, len(case.where) - ratio * case.size))
    top = case.ranked()[::-1][:visits]
    expected = [float(i in top or not case.seen[i]) for i in range(case.size)]
    assert close(case.chances(dict(type="ucb", prune_ratio=ratio)), expected)


@pytest.mark.parametrize("multiple_of", [1, 2])
def test_orderdp(case: Case, multiple_of: int):
    """Of the pool that the generator gives, the highest."""
    plan = case.drawn(dict(type="orderdp", pool=0.6, top=0.5), 3, multiple_of)
    order = torch.randperm(len(case.where), generator=generator(3)).tolist()
    pool = [case.where[place] for place in order[: round(0.6 * len(case.where))]]
    unseen = [i for i in range(case.size) if not case.seen[i]]
    if plan is None:
        assert len(pool) < 2 * multiple_of
        return
    number = len(plan) - len(unseen)
    assert abs(number - 0.3 * len(case.where)) <= multiple_of / 2 + 1e-9 or number <= multiple_of
    highest = sorted(pool, key=lambda i: case.scores[i])[len(pool) - number :]
    assert sorted(plan.indices.tolist()) == sorted(highest + unseen) and (plan.weights == 1).all()


def test_orderdp_visits_the_jth_highest_with_the_papers_chance():
    """Theorem 1: gamma_j, the chance that of a pool of s samples the j-th highest of n is among the q highest."""
    size, pool, top = 7, 4, 2
    scores = [0.3, 0.9, 0.1, 0.7, 0.5, 0.2, 0.8]
    counts = Counter()
    for drawn in itertools.combinations(range(size), pool):
        counts.update(sorted(drawn, key=lambda i: -scores[i])[:top])
    for place, i in enumerate(sorted(range(size), key=lambda i: -scores[i]), 1):
        ways = sum(
            math.comb(place - 1, above - 1) * math.comb(size - place, pool - above) for above in range(1, top + 1)
        )
        assert counts[i] == ways
    policy = build_policy(dict(type="orderdp", pool=pool / size, top=top / pool))
    seen, drawn_counts, draws = torch.ones(size, dtype=torch.bool), np.zeros(size), 4000
    for seed in range(draws):
        plan = policy.draw(torch.tensor(scores), seen, generator(seed), 1)
        assert plan is not None and len(plan) == top
        drawn_counts[plan.indices] += 1
    share = np.array([counts[i] / math.comb(size, pool) for i in range(size)])
    assert (abs(drawn_counts / draws - share) <= 4.5 * np.sqrt(share * (1 - share) / draws) + 1e-12).all()


# ---- windows of losses ------------------------------------------------------------------------------------


def lloyd(losses: list[float], number: int) -> list[int]:
    """k-means in one dimension, from the middles of equal shares."""
    ordered = sorted(losses)
    centres = [ordered[int((j + 0.5) / number * len(ordered))] for j in range(number)]
    while True:
        groups: list[list[float]] = [[] for _ in range(number)]
        places = []
        for loss in losses:
            distances = [abs(loss - centre) for centre in centres]
            place = max(j for j in range(number) if distances[j] == min(distances))
            groups[place].append(loss)
            places.append(place)
        moved = [sum(group) / len(group) if group else centre for group, centre in zip(groups, centres, strict=True)]
        if moved == pytest.approx(centres, rel=1e-12):
            return places
        centres = moved


@pytest.mark.parametrize("number", [1, 4, 10])
def test_groups_of_like_losses(case: Case, number: int):
    losses = [case.scores[i] for i in case.where]
    found = groups_of(np.array(losses, dtype=np.float32), number).tolist()
    assert found == lloyd(losses, number)
    assert [group for _, group in sorted(zip(losses, found, strict=True))] == sorted(found)


def test_groups_of_equal_losses_are_one():
    assert set(groups_of(np.full(9, 0.5, dtype=np.float32), 4).tolist()) == {3}


@pytest.mark.parametrize(("number", "alpha", "width"), [(10, 0.5, 5), (5, 0.9, 5), (4, 0.3, 2)])
def test_seta(case: Case, number: int, alpha: float, width: int):
    first = case.number % (number - width + 1)
    expected = [1.0] * case.size
    for i, group in zip(case.where, lloyd([case.scores[i] for i in case.where], number), strict=True):
        inside = case.number / 20 >= 0.6 or first <= group < first + width  # partial annealing: all, at random
        expected[i] = 0.8 if inside else 0.0
    policy = dict(type="seta", prune_ratio=0.2, num_groups=number, window=alpha, delta=0.6)
    assert close(case.chances(policy), expected)


@pytest.mark.parametrize("cycle", [1, 3, 4])
def test_scan(case: Case, cycle: int):
    place = (case.number - 1) % (cycle + 1)
    ranked = case.ranked()
    count = int(0.3 * len(ranked))
    current = 0.5 * (1 + math.cos((cycle - place) * math.pi / cycle))
    expected = [1.0] * case.size
    for i in ranked[:count] + ranked[len(ranked) - count :]:
        expected[i] = 1 - current if place else 1.0
    assert close(case.chances(dict(type="scan", cycle=cycle)), expected)


def test_scan_saves_its_ratio_over_a_cycle():
    case = Case(3)
    policy = build_policy(dict(type="scan", prune_ratio=0.25, cycle=3))
    saved = []
    for number in range(1, 9):
        known = Snapshot(
            case.snapshot.scores, torch.ones(case.size, dtype=torch.bool), case.snapshot.times_seen, 0.1, number
        )
        found = policy.chances(known)
        saved.append(0.0 if found is None else 1 - found.by_sample().mean())
    exact = 2 * int(0.25 * case.size) / case.size / 2
    assert np.mean(saved) == pytest.approx(exact) and saved[:4] == pytest.approx(saved[4:])


# ---- hidden while learned -----------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [2, 3])
def test_kakurenbo(case: Case, every: int):
    fraction = 0.6 * (1 if case.number < 6 else 0.8 if case.number < 12 else 0.6 if case.number < 16 else 0.4)
    lowest = case.ranked()[: int(fraction * case.size)]
    hidden = [
        i
        for i in lowest
        if math.exp(-case.scores[i]) >= 0.7 and (i + case.number) % every  # confident, and not its turn
    ]
    policy = build_policy(dict(type="kakurenbo", prune_ratio=0.6, rescore_every=every))
    found = policy.chances(case.snapshot)
    assert close(case.chances(policy), [float(i not in hidden) for i in range(case.size)])
    if found is not None:
        assert not found.weighted and found.weight == pytest.approx(1 / (1 - fraction * (every - 1) / every))


@pytest.mark.parametrize("every", [2, 4])
def test_ies(every: int):
    hidden_anywhere = 0
    for seed in SEEDS:
        case = Case(seed, scale=2e-3)
        hidden = [i for i in case.where if case.scores[i] < 1e-3 and case.times[i] >= 5 and (i + case.number) % every]
        hidden_anywhere += len(hidden)
        expected = [float(i not in hidden) for i in range(case.size)]
        assert close(case.chances(dict(type="ies", rescore_every=every)), expected)
    assert hidden_anywhere


def test_progressive_dropout_by_difficulty(case: Case):
    dropped = [i for i in case.where if math.exp(-case.scores[i]) >= 0.6 and (i + case.number) % 2]
    revises = case.number >= 20 - 2
    expected = [float(revises or i not in dropped) for i in range(case.size)]
    assert close(case.chances(dict(type="progressive_dropout", tau=0.6, revision=2)), expected)


def test_scalar_random_dropout(case: Case):
    share = 1.0 if case.number >= 19 else 0.9**case.number
    found = case.chances(dict(type="progressive_dropout", mode="srd", decay=0.9))
    assert close(found, [share] * case.size)


@pytest.mark.parametrize("name", ["kakurenbo", "ies", "progressive_dropout"])
def test_what_is_hidden_is_visited_again_after_so_many_passes(name: str):
    own = {"kakurenbo": dict(prune_ratio=0.9), "ies": dict(min_visits=1), "progressive_dropout": {}}[name]
    policy = build_policy(dict(type=name, rescore_every=3, **own))
    schedule = EpochSchedule(30, 20, 1)
    pruner = Pruner(schedule, policy, score="raw")
    last = [0] * 30
    for number in range(19):
        plan = pruner.begin_pass()
        pruner.record(plan.indices, torch.full((len(plan),), 1e-5))
        pruner.advance(len(plan))
        pruner.finish_pass()
        for i in plan.indices.tolist():
            assert number - last[i] <= 3
            last[i] = number
        assert min(last) >= number - 2 and (number == 0 or len(plan) < 30)
