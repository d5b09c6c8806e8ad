"""What every policy of the package promises, whatever its rule."""

from __future__ import annotations

import io
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from infobatch_mm import PruningPolicy, Thinning
from infobatch_mm.core import EpochSchedule, Plan, Pruner, Snapshot, build_policy, chances, systematic
from infobatch_mm.core.policy_registry import registered
from infobatch_mm.core.rng import generator

N, BATCH, DRAWS = 60, 4, 2000

#: Arguments that a policy needs, or without which it prunes nothing of what these tests make up.
NEEDED: dict[str, dict[str, Any]] = {
    "auto": dict(bar=1.0),
    "class_budgets": dict(classes=[place * place % 5 for place in range(N)]),
    "ies": dict(tolerance=0.5),
}


def by_name(name: str) -> dict[str, Any]:
    return dict(type=name, **NEEDED.get(name, {}))


#: Every policy of the package, and arguments that make another policy of it.
OURS = [name for name, each in sorted(registered().items()) if each.__module__.startswith("infobatch_mm.")]
POLICIES: dict[str, Any] = {name: by_name(name) for name in OURS}
POLICIES |= {
    "infobatch, quantile": dict(type="infobatch", quantile=0.6),
    "epsilon_greedy, half": dict(type="epsilon_greedy", epsilon=0.5, prune_ratio=0.3),
    "repb, chances": dict(type="repb", weights="chances"),
    "progressive_dropout, srd": dict(type="progressive_dropout", mode="srd"),
    "orderdp, ratio": dict(type="orderdp", prune_ratio=0.6),
    "seta, no ratio": dict(type="seta", prune_ratio=0.0),
    "scan, short": dict(type="scan", cycle=2, warmup=0, prune_ratio=0.4),
}


def snapshot(num_seen: int = N - 6) -> Snapshot:
    """In the eighth of 28 passes; every sample that was seen was seen six times."""
    scores = torch.rand(N, generator=generator(7))
    seen = torch.arange(N) < num_seen
    columns = {"above": seen & (scores > 0.6), "passes": torch.randint(3, 7, (N,), generator=generator(6))}
    return Snapshot(torch.where(seen, scores, 0.0), seen, 6 * seen.to(torch.int32), 0.25, 7, 1 / 28, 0.1, columns)


@pytest.fixture(params=POLICIES.values(), ids=list(POLICIES))
def policy(request: pytest.FixtureRequest) -> PruningPolicy:
    return build_policy(request.param)


def drawn(policy: PruningPolicy, seed: int, multiple_of: int = BATCH) -> Plan | None:
    return policy.plan(snapshot(), generator(seed), multiple_of)


def test_every_policy_but_none_prunes_here(policy: PruningPolicy):
    assert (drawn(policy, 0) is None) == (policy.name == "none")


def test_the_weighted_sum_over_plans_is_the_sum_over_the_data(policy: PruningPolicy):
    if not policy.unbiased:
        return
    values = torch.rand(N, generator=generator(8), dtype=torch.float64)
    sums = []
    for seed in range(DRAWS):
        plan = drawn(policy, seed)
        sums.append(values.sum() if plan is None else (values[plan.indices] * plan.weights).sum())
    estimates = torch.stack(sums)
    error = estimates.std() / len(sums) ** 0.5
    assert abs(estimates.mean() - values.sum()) <= 4 * error + 1e-5


def test_what_is_not_weighed_by_its_chances_is_said_to_be_biased(policy: PruningPolicy):
    values = torch.linspace(0.5, 1.5, N, dtype=torch.float64)[snapshot().scores.argsort().argsort()]
    sums = [float((values[plan.indices] * plan.weights).sum()) for seed in range(300) if (plan := drawn(policy, seed))]
    if policy.unbiased or not sums:
        return
    assert abs(np.mean(sums) - float(values.sum())) > 10 * np.std(sums) / len(sums) ** 0.5


def test_weights_are_the_inverse_of_the_chances(policy: PruningPolicy):
    if not policy.unbiased:
        return
    times, weights = torch.zeros(N), torch.ones(N)
    for seed in range(DRAWS):
        plan = drawn(policy, seed)
        if plan is None:
            return
        times[plan.indices] += 1
        weights[plan.indices] = plan.weights
    chances = times / DRAWS
    # Of 60 samples none is farther off than five standard errors.
    assert torch.all((chances - 1 / weights).abs() <= 5 * (chances * (1 - chances) / DRAWS).sqrt() + 1e-6)


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


def test_draw_is_the_plan_of_what_it_is_told(policy: PruningPolicy):
    known = snapshot()
    least = Snapshot(known.scores, known.seen, known.seen.to(torch.int32), progress=0.0)
    plan = policy.plan(least, generator(3), BATCH)
    again = policy.draw(known.scores, known.seen, generator(3), BATCH)
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
        for number in range(7):
            plan = pruner.begin_pass()
            for part in plan.indices.split(BATCH):
                pruner.record(part, torch.rand(len(part), generator=generator(9, number, int(part[0]))))
            pruner.advance(len(plan))
            pruner.finish_pass()
        return pruner

    pruner = trained()
    plan = pruner.begin_pass()
    pruner.record(plan.indices[:BATCH], torch.rand(BATCH, generator=generator(8)))
    pruner.advance(BATCH)
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    file.seek(0)
    resumed = Pruner(EpochSchedule(N, 10, BATCH), policy, seed=99)
    assert resumed.load_state_dict(torch.load(file, weights_only=True))
    again = resumed.begin_pass()
    assert torch.equal(plan.indices, again.indices) and torch.equal(plan.weights, again.weights)
    for each in (pruner, resumed):
        each.record(plan.indices[BATCH:], torch.rand(len(plan) - BATCH, generator=generator(7)))
        each.advance(len(plan) - BATCH)
    assert pruner.finish_pass() == resumed.finish_pass()
    plan, again = pruner.begin_pass(), resumed.begin_pass()
    assert torch.equal(plan.indices, again.indices) and torch.equal(plan.weights, again.weights)


def test_another_policy_is_refused_on_resume(policy: PruningPolicy):
    state = Pruner(EpochSchedule(N, 10, BATCH), policy).state_dict()
    for other in map(build_policy, POLICIES.values()):
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


def units_of_a_plan(monkeypatch: pytest.MonkeyPatch, known: Snapshot) -> tuple[np.ndarray, Plan, Any]:
    """What a plan by ``'variance'`` is drawn with, that plan, and the draw itself."""
    taken: list[np.ndarray] = []
    draw = chances.systematic

    def noted(units: np.ndarray, source: torch.Generator) -> np.ndarray:
        taken.append(units)
        return draw(units, source)

    monkeypatch.setattr(chances, "systematic", noted)
    plan = build_policy("variance", 0.4).plan(known, generator(0), 1)
    assert plan is not None and len(taken) == 1
    return taken[0], plan, draw


def small(scores: list[float]) -> Snapshot:
    seen = torch.ones(len(scores), dtype=torch.bool)
    return Snapshot(torch.tensor(scores), seen, seen.to(torch.int32), 0.25)


@pytest.mark.parametrize("scores", [[0.3, 0.1, 0.7, 0.4, 0.02], [0.5, 0.2, 0.5, 0.2], [0.1, 0.4, 0.0, 0.3, 0.2]])
def test_all_starts_in_all_orders_give_exactly_the_chances_that_weights_are_the_inverse_of(
    monkeypatch: pytest.MonkeyPatch, scores: list[float]
):
    units, plan, draw = units_of_a_plan(monkeypatch, small(scores))
    one = systematic.ONE
    uncertain = [place for place in range(len(scores)) if plan.weights[plan.indices == place].tolist() != [1.0]]
    assert len(units) == len(uncertain)
    given = SimpleNamespace(int32=torch.int32, int64=torch.int64)
    monkeypatch.setattr(systematic, "torch", given)
    for order in itertools.permutations(range(len(units))):
        given.randperm = lambda size, order=order, **options: torch.tensor(order, dtype=torch.int32)
        # Between the ends of the samples' stretches, one start draws what another does.
        starts = sorted({0, one, *(int(end) % one for end in np.cumsum(units[list(order)]))})
        times = np.zeros(len(units), dtype=np.int64)
        for start, end in itertools.pairwise(starts):
            given.randint = lambda *size, start=start, **options: torch.tensor(start)
            times[draw(units, generator(0))] += end - start
            given.randint = lambda *size, end=end, **options: torch.tensor(end - 1)
            times[draw(units, generator(0))] += end - start
        assert (times == 2 * units).all()  # from the first start of each stretch, and from the last
    for place, unit in zip(uncertain, units, strict=True):
        weight = plan.weights[plan.indices == place].tolist()
        assert not weight or weight == [pytest.approx(one / unit, rel=1e-6)]


def test_a_hundred_thousand_draws_are_as_frequent_as_their_weights_say(monkeypatch: pytest.MonkeyPatch):
    scores = [0.3, 0.1, 0.7, 0.4, 0.02, 0.2, 0.6, 0.15]
    units, _, draw = units_of_a_plan(monkeypatch, small(scores))
    share, draws, source = units / systematic.ONE, 100_000, generator(4)
    times = np.zeros(len(units))
    for _ in range(draws):
        times[draw(units, source)] += 1
    assert len(set(share.round(6))) > 3
    assert (abs(times / draws - share) <= 4.5 * np.sqrt(share * (1 - share) / draws) + 1e-12).all()


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
        (MASK, r"chances\(\) returned a Tensor, expected a Thinning, Chances or None"),
    ],
    ids=["short", "float", "indices", "numpy", "one", "negative", "vector", "bare"],
)
def test_chances_that_cannot_be_are_refused_with_the_policys_name(found: Any, message: str):
    with pytest.raises(ValueError, match=r"policy 'wrong' \(Wrong\) gave chances that cannot be: " + message):
        Wrong(found).plan(snapshot(), generator(0), BATCH)
