"""What every policy of the package promises, whatever its rule."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from infobatch_mm import PruningPolicy, Thinning
from infobatch_mm.core import EpochSchedule, Plan, Pruner, Snapshot, build_policy
from infobatch_mm.core.policy_registry import registered
from infobatch_mm.core.rng import generator

N, BATCH = 60, 4

#: Every policy of the package, and the arguments that make another policy of it.
OURS = [name for name, each in sorted(registered().items()) if each.__module__.startswith("infobatch_mm.")]
POLICIES: list[Any] = [*OURS]
POLICIES.append(dict(type="infobatch", quantile=0.6))


def snapshot(num_seen: int = N - 6) -> Snapshot:
    scores = torch.rand(N, generator=generator(7))
    seen = torch.arange(N) < num_seen
    return Snapshot(torch.where(seen, scores, 0.0), seen, seen.to(torch.int32), 0.25)


@pytest.fixture(params=POLICIES, ids=str)
def policy(request: pytest.FixtureRequest) -> PruningPolicy:
    return build_policy(request.param)


def drawn(policy: PruningPolicy, seed: int, multiple_of: int = BATCH) -> Plan | None:
    return policy.plan(snapshot(), generator(seed), multiple_of)


def test_the_weighted_sum_over_plans_is_the_sum_over_the_data(policy: PruningPolicy):
    values = torch.rand(N, generator=generator(8), dtype=torch.float64)
    sums = []
    for seed in range(3000):
        plan = drawn(policy, seed)
        sums.append(values.sum() if plan is None else (values[plan.indices] * plan.weights).sum())
    estimates = torch.stack(sums)
    error = estimates.std() / len(sums) ** 0.5
    assert abs(estimates.mean() - values.sum()) <= 4 * error + 1e-5


def test_weights_are_the_inverse_of_the_chances(policy: PruningPolicy):
    times, weights = torch.zeros(N), torch.ones(N)
    for seed in range(3000):
        plan = drawn(policy, seed)
        if plan is None:
            return
        times[plan.indices] += 1
        weights[plan.indices] = plan.weights
    chances = times / 3000
    # Of 60 samples none is farther off than five standard errors.
    assert torch.all((chances - 1 / weights).abs() <= 5 * (chances * (1 - chances) / 3000).sqrt() + 1e-6)


@pytest.mark.parametrize("multiple_of", [1, 2, 5, 7])
def test_every_batch_is_full(policy: PruningPolicy, multiple_of: int):
    for seed in range(20):
        plan = drawn(policy, seed, multiple_of)
        if plan is not None:
            assert plan.pruned and len(plan) % multiple_of == 0 and len(plan.indices.unique()) == len(plan)


def test_equal_seeds_draw_equal_plans_and_others_do_not(policy: PruningPolicy):
    first, again, other = (drawn(policy, seed) for seed in (1, 1, 2))
    if first is None:
        assert again is None and other is None
        return
    assert again is not None and other is not None
    assert torch.equal(first.indices, again.indices) and torch.equal(first.weights, again.weights)
    assert first.indices.tolist() != other.indices.tolist()


def test_what_was_never_seen_is_visited_where_scores_decide(policy: PruningPolicy):
    if not policy.needs_scores:
        return
    for seed in range(50):
        plan = drawn(policy, seed)
        assert plan is not None and set(range(N - 6, N)) <= set(plan.indices.tolist())
    assert policy.plan(snapshot(num_seen=0), generator(0), BATCH) is None


def test_draw_is_the_same_without_a_snapshot(policy: PruningPolicy):
    known = snapshot()
    plan, again = drawn(policy, 3), policy.draw(known.scores, known.seen, generator(3), BATCH)
    assert (plan is None) == (again is None)
    if plan is not None and again is not None:
        assert torch.equal(plan.indices, again.indices)


def test_nothing_of_what_is_known_is_changed(policy: PruningPolicy):
    known, before = snapshot(), snapshot()
    policy.plan(known, generator(0), BATCH)
    for name in ("scores", "seen", "times_seen"):
        assert torch.equal(getattr(known, name), getattr(before, name))


def test_settings_make_the_same_policy(policy: PruningPolicy):
    settings = policy.settings()
    name = settings.pop("policy")
    assert build_policy(dict(type=name, **settings)).settings() == policy.settings()
    assert eval(repr(policy)) == dict(type=name, **settings)


def test_a_pass_goes_on_after_a_resume(policy: PruningPolicy):
    def trained() -> Pruner:
        pruner = Pruner(EpochSchedule(N, 10, BATCH), policy, seed=5)
        pruner.begin_pass()
        pruner.record(torch.arange(N), torch.rand(N, generator=generator(9)))
        pruner.advance(N)
        pruner.finish_pass()
        return pruner

    pruner = trained()
    plan = pruner.begin_pass()
    pruner.advance(BATCH)
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    file.seek(0)
    resumed = Pruner(EpochSchedule(N, 10, BATCH), policy, seed=99)
    assert resumed.load_state_dict(torch.load(file, weights_only=True))
    again = resumed.begin_pass()
    assert torch.equal(plan.indices, again.indices) and torch.equal(plan.weights, again.weights)
    pruner.advance(len(plan) - BATCH)
    resumed.advance(len(plan) - BATCH)
    assert pruner.finish_pass() == resumed.finish_pass()
    assert torch.equal(pruner.begin_pass().indices, resumed.begin_pass().indices)


def test_another_policy_is_refused_on_resume(policy: PruningPolicy):
    state = Pruner(EpochSchedule(N, 10, BATCH), policy).state_dict()
    for name in sorted(registered()):
        other = build_policy(name)
        if other.settings() != policy.settings():
            with pytest.raises(ValueError, match=r"the checkpoint was pruned with .*, this run has"):
                Pruner(EpochSchedule(N, 10, BATCH), other).check_state(state)


class Wrong(PruningPolicy):
    """A user's, whose chances are what it was made with."""

    name = "wrong"

    def __init__(self, found: Any) -> None:
        self.found = found

    def is_active(self, progress: float) -> bool:
        return True

    def chances(self, snapshot: Snapshot) -> Any:
        return self.found

    def settings(self) -> dict[str, Any]:
        return {"policy": self.name, "found": str(self.found)}


MASK = torch.ones(N, dtype=torch.bool)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            Thinning(MASK[:-1], 0.5),
            r"candidates are torch.bool of shape \(59,\), expected a bool tensor of shape \(60,",
        ),
        (Thinning(MASK.float(), 0.5), r"candidates are torch.float32"),
        (Thinning(MASK.nonzero().flatten(), 0.5), r"candidates are torch.int64"),
        (Thinning(MASK.numpy(), 0.5), r"candidates are ndarray"),
        (Thinning(MASK, 1.0), r"ratio=1.0, expected a number in \[0, 1\)"),
        (Thinning(MASK, -0.1), r"ratio=-0.1"),
        (Thinning(MASK, torch.full((N,), 0.5)), r"ratio=tensor"),
        (MASK, r"chances\(\) returned a Tensor, expected a Thinning or None"),
    ],
    ids=["short", "float", "indices", "numpy", "one", "negative", "vector", "bare"],
)
def test_chances_that_cannot_be_are_refused_with_the_policys_name(found: Any, message: str):
    with pytest.raises(ValueError, match=r"policy 'wrong' \(Wrong\) gave chances that cannot be: " + message):
        Wrong(found).plan(snapshot(), generator(0), BATCH)
