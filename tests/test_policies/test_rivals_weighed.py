"""Published policies that weigh, told slowly by their formulas, and targets that rivals meet."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from infobatch_mm.core import EpochSchedule, Pruner, Snapshot, build_policy
from infobatch_mm.core.rng import generator
from infobatch_mm.policies import RepbPolicy

from .cases import SEEDS, Case, close


@pytest.fixture(params=SEEDS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_repb(case: Case):
    candidates = [i for i in case.where if not case.above[i]]
    for weights in ("counts", "chances"):
        policy = build_policy(dict(type="repb", prune_ratio=0.3, weights=weights))
        found = policy.chances(case.snapshot)
        assert found is not None
        expected = [0.7 if i in candidates else 1.0 for i in range(case.size)]
        assert close(found.by_sample().tolist(), expected)
        plan = policy.plan(case.snapshot, generator(0), 1)
        if plan is None:
            continue
        drawn = [i for i in plan.indices.tolist() if i in candidates]
        for i, weight in zip(plan.indices.tolist(), plan.weights.tolist(), strict=True):
            # Passes so far, this one included, over how many of them visited the sample.
            by_counts = (case.number + 1) / (case.passes[i] + 1)
            by_chances = len(candidates) / len(drawn) if i in candidates else 1.0
            assert weight == pytest.approx(by_counts if weights == "counts" else by_chances, rel=1e-6)


def test_repb_with_another_score_compares_with_the_mean_of_all(case: Case):
    known = Snapshot(case.snapshot.scores, case.snapshot.seen, case.snapshot.times_seen, 0.3, 6)
    found = RepbPolicy(0.3).chances(known)
    assert found is not None
    mean = sum(case.scores[i] for i in case.where) / len(case.where)
    below = [case.seen[i] and case.scores[i] < mean for i in range(case.size)]
    assert close(found.by_sample().tolist(), [0.7 if is_below else 1.0 for is_below in below])


def test_weights_by_counts_are_those_of_the_passes_that_visited_a_sample():
    pruner = Pruner(EpochSchedule(40, 12, 4), build_policy("repb"), seed=3)
    visits = [0] * 40
    weighed = 0
    for number in range(12):
        plan = pruner.begin_pass()
        for i, weight in zip(plan.indices.tolist(), plan.weights.tolist(), strict=True):
            visits[i] += 1
            if plan.pruned:
                assert weight == pytest.approx((number + 1) / visits[i])
                weighed += weight > 1.2
        for batch in plan.indices.split(4):
            pruner.record(batch, torch.rand(len(batch), generator=generator(number, int(batch[0]))))
        pruner.advance(len(plan))
        pruner.finish_pass()
    assert weighed and min(visits) < 12


@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_class_budgets(case: Case, ratio: float):
    classes = [(7 * i) % 4 if i % 3 else 5 for i in range(case.size)]
    visits = max(len(case.where) - ratio * case.size, 0.1 * len(case.where))
    sizes = Counter(classes[i] for i in case.where)
    losses = {each: sum(case.scores[i] for i in case.where if classes[i] == each) / sizes[each] for each in sizes}
    # Visits in proportion to sqrt(p * l), between a tenth of a class and all of it: by halving the factor's bracket.
    low, high = 0.0, 1e6
    for _ in range(200):
        factor = (low + high) / 2
        share = {each: factor * math.sqrt(sizes[each] * losses[each]) / sizes[each] for each in sizes}
        share = {each: min(1.0, max(0.1, value)) for each, value in share.items()}
        total = sum(share[each] * sizes[each] for each in sizes)
        low, high = (factor, high) if total < visits else (low, factor)
    policy = build_policy(dict(type="class_budgets", classes=classes, prune_ratio=ratio))
    found = policy.chances(case.snapshot)
    assert found is not None and found.weighted
    expected = [share[classes[i]] if case.seen[i] else 1.0 for i in range(case.size)]
    assert found.by_sample().tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["epsilon_greedy", "ucb", "repb", "class_budgets"])
def test_a_target_is_met_within_a_hundredth(name: str):
    own = dict(classes=[i % 4 for i in range(400)]) if name == "class_budgets" else {}
    policy = build_policy(dict(type=name, target_saving=0.35, delta=1.0, **own))
    pruner = Pruner(EpochSchedule(400, 20, 4), policy, seed=2)
    for number in range(20):
        plan = pruner.begin_pass()
        for batch in plan.indices.split(4):
            pruner.record(batch, torch.rand(len(batch), generator=generator(number, int(batch[0]))))
        pruner.advance(len(plan))
        pruner.finish_pass()
    assert pruner.summary()["saved_ratio"] == pytest.approx(0.35, abs=0.01)
    assert policy.settings()["target_saving"] == 0.35 and "prune_ratio" not in policy.settings()


def test_classes_of_another_data_set_are_refused():
    policy = build_policy(dict(type="class_budgets", classes=[0, 1, 1]))
    with pytest.raises(ValueError, match=r"class of 3 samples, this data set has \d+"):
        policy.chances(Case(0).snapshot)


def test_classes_are_read_from_a_file(tmp_path: Path):
    np.save(tmp_path / "classes.npy", np.arange(70) % 3)
    case = Case(2)
    classes = (np.arange(case.size) % 3).tolist()
    np.save(tmp_path / "classes.npy", np.array(classes))
    by_file = build_policy(dict(type="class_budgets", classes=str(tmp_path / "classes.npy")))
    assert case.chances(by_file) == case.chances(dict(type="class_budgets", classes=classes))
    assert by_file.settings()["classes"] == str(tmp_path / "classes.npy")
    assert build_policy(eval(repr(by_file))).settings() == by_file.settings()
