"""What passes are worth: the figures by hand, in the books of a run, and through a resume."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from infobatch_mm.core import EpochSchedule, IterSchedule, Pruner, build_policy
from infobatch_mm.core.console import Remarks, end_line, pass_line
from infobatch_mm.core.watcher import Watcher
from infobatch_mm.core.worth import Worth, equal_length, limit, noise_scale, pass_worth

N, BATCH = 40, 4


def trained(policy: Any, passes: int, scores: np.ndarray, **options: Any) -> Pruner:
    """A training of 8 passes over 40 samples, as far as so many passes, whose losses stay what they are."""
    pruner = Pruner(EpochSchedule(len(scores), 8, BATCH), build_policy(policy), **{"score": "raw", **options})
    for _ in range(passes):
        one_pass(pruner, scores)
    return pruner


def one_pass(pruner: Pruner, scores: np.ndarray) -> None:
    for indices in pruner.begin_pass().indices.split(BATCH):
        pruner.record(indices, torch.from_numpy(scores)[indices])
        pruner.advance(len(indices))
    pruner.finish_pass()


def unequal(seed: int = 0) -> np.ndarray:
    """Scores of which a tenth is ten times as large as the others: a limit of about 3."""
    source = np.random.default_rng(seed)
    scores = source.uniform(0.9, 1.1, N)
    scores[: N // 10] *= 10
    return source.permutation(scores).astype(np.float32)


def test_figures_of_a_pass_by_hand() -> None:
    # h = 1, 1, 2 and pi = 1/2, 1/2, 1: cost 2/3; worth 6 / (2 + 2 + 4); limit (6/3) / (4/3)^2.
    found = pass_worth(np.array([1.0, 1.0, 2.0]), np.array([0.5, 0.5, 1.0]))
    assert (found.cost, found.worth, found.limit) == pytest.approx((2 / 3, 0.75, 1.125))
    assert found.efficiency == pytest.approx(1.125)  # chances in proportion to norms, so it is the limit itself
    assert pass_worth(np.array([1.0, 1.0, 2.0])) == Worth(1.0, 1.0, pytest.approx(1.125))
    biased = pass_worth(np.array([1.0, 3.0]), np.array([0.0, 1.0]), weighted=False)
    assert (biased.cost, biased.worth, biased.efficiency) == (0.5, None, None)


@pytest.mark.parametrize("size", [1000, 2**17 + 12345, 10**6])
def test_a_part_of_many_samples_tells_of_all(size: int) -> None:
    norms = np.random.default_rng(0).lognormal(size=size).astype(np.float32)
    pruner = Pruner(EpochSchedule(size, 8, 100), build_policy("random"))
    pruner.record(torch.arange(size), torch.from_numpy(norms))
    pruner.store.flush()
    found = pruner.begin_pass().worth
    plan = pruner.begin_pass()
    assert found is not None and (found.cost, found.worth) == pytest.approx((len(plan) / size, len(plan) / size))
    assert found.limit == pytest.approx(limit(norms), rel=0.05)
    assert pruner.limit == found.limit


def test_a_pruned_run_is_as_good_as_a_shorter_one_of_its_worth_or_of_its_cost() -> None:
    worth = Worth(cost=0.4, worth=0.8, limit=3.0)
    assert equal_length(worth, 0.0) == pytest.approx(0.4)
    assert equal_length(worth, math.inf) == pytest.approx(0.8)
    # B_noise = B: half of each step of the host is lost to noise, a third of each pruned one: 0.4 * (2/3) / (1/2).
    assert equal_length(worth, 1.0) == pytest.approx(0.4 * (2 / 3) / (1 / 2))
    lengths = [equal_length(worth, noise) for noise in (0, 0.1, 1, 10, 100, math.inf)]
    assert lengths == sorted(lengths)


def test_noise_scale_by_hand() -> None:
    gradients = np.array([[3.0, 0.0], [1.0, 0.0]])
    mean = gradients.mean(0)
    assert noise_scale((gradients**2).sum(1).mean(), (mean**2).sum()) == pytest.approx(1 / 4)
    assert noise_scale(1.0, -0.1) == math.inf and noise_scale(1.0, 1.0 + 1e-9) == 0


@pytest.mark.parametrize("policy", ["infobatch", "variance", "random", dict(type="variance", rescale="step")], ids=str)
def test_a_run_tells_what_its_passes_were_worth(policy: Any) -> None:
    scores = unequal()
    pruner = trained(policy, 3, scores)
    first, second, _ = pruner.history
    knows_all = pruner.policy.needs_scores  # which visits every sample first
    if knows_all:
        assert [first[name] for name in ("worth", "cost", "efficiency", "limit")] == [None] * 4
    chances = pruner.policy.chances(pruner._snapshot((pruner.store.values, pruner.store.seen, pruner.store.times_seen)))
    assert chances is not None
    pi = chances.by_sample()
    squares = scores.astype(np.float64) ** 2
    expected = squares.sum() / (squares / pi).sum()
    # What was paid is what full batches came to.
    assert second["cost"] == second["kept_ratio"] and second["efficiency"] == pytest.approx(expected / pi.mean())
    assert second["worth"] == pytest.approx(second["efficiency"] * second["kept_ratio"])
    if knows_all:
        assert second["limit"] == pytest.approx(squares.mean() / scores.mean(dtype=np.float64) ** 2)
    assert pruner.scalars()["infobatch/worth"] == pruner.history[-1]["worth"]
    third = pruner.history[-1]
    assert f"worth {third['worth']:.1%} of a full pass (efficiency {third['efficiency']:.2f}, " in pass_line(pruner)


@pytest.mark.parametrize("policy", ["epsilon_greedy", dict(type="infobatch", rescale="none")], ids=str)
def test_visits_without_weights_are_worth_nothing_that_can_be_told(policy: Any) -> None:
    pruner = trained(policy, 3, unequal())
    assert pruner.history[-1]["worth"] is None and pruner.history[-1]["limit"] > 2
    assert "worth" not in pass_line(pruner) and ", limit " in pass_line(pruner)
    assert pruner.history[-1]["kept"] < N
    if pruner.policy.rescale == "none":
        assert torch.equal(pruner.begin_pass().weights, torch.ones(len(pruner.begin_pass())))
        assert pruner.begin_pass().pruned


@pytest.mark.parametrize("score", ["ucb", "forgetting", "second_difference"])
def test_scores_that_are_no_norms_tell_nothing(score: str) -> None:
    pruner = trained("random", 3, unequal(), score=score)
    assert pruner.history[-1]["limit"] is None and pruner.limit is None
    for policy in ("auto", dict(type="variance", min_worth=0.9)):
        with pytest.raises(ValueError, match=f"score='{score}' does not tell"):
            trained(policy, 0, unequal(), score=score)


def test_relative_denoising_losses_are_squared_norms() -> None:
    pruner = Pruner(EpochSchedule(N, 8, BATCH), build_policy("random"), score="timestep")
    losses = unequal()
    for indices in pruner.begin_pass().indices.split(BATCH):
        pruner.record(indices, torch.from_numpy(losses)[indices], log_snr=torch.zeros(len(indices)))
        pruner.advance(len(indices))
    pruner.finish_pass()
    seen = pruner.store.seen.numpy()
    roots = np.sqrt(losses[seen].astype(np.float64))
    filled = np.where(seen, np.sqrt(losses.astype(np.float64)), roots.mean())
    assert pruner.limit == pytest.approx(np.mean(filled**2) / filled.mean() ** 2, rel=1e-5)


def test_a_resumed_pass_keeps_what_it_was_worth_when_it_was_planned() -> None:
    pruner = trained("variance", 2, unequal())
    plan = pruner.begin_pass()
    for indices in plan.indices.split(BATCH)[:2]:
        pruner.record(indices, torch.full((len(indices),), 50.0))
        pruner.advance(len(indices))
    other = trained("variance", 0, unequal())
    other.load_state_dict(pruner.state_dict())
    for each in (pruner, other):
        each.advance(len(plan) - each.visited)
        each.finish_pass()
    assert pruner.history == other.history and other.history[-1]["worth"] is not None
    # A state of a version that did not know of it.
    state = trained("variance", 3, unequal()).state_dict()
    state["history"] = [
        {key: entry[key] for key in entry if key not in ("worth", "cost", "efficiency", "limit")}
        for entry in state["history"]
    ]
    old = trained("variance", 0, unequal())
    old.load_state_dict(state)
    assert "infobatch/worth" not in old.scalars() and "worth" not in pass_line(old)
    state = pruner.state_dict()
    pruner.begin_pass()
    state = pruner.state_dict()
    state["plan"]["worth"] = {"cost": 1.0}
    with pytest.raises(ValueError, match="damaged at 'plan'"):
        trained("variance", 0, unequal()).load_state_dict(state)


def test_a_host_that_keeps_its_order_is_told_the_limit() -> None:
    watcher = Watcher(IterSchedule(N, 30, BATCH), build_policy("none"))
    scores = unequal()
    for _ in range(11):
        watcher.record(torch.arange(N), torch.from_numpy(scores))
        watcher.observe(BATCH)
    entry = watcher.history[0]
    assert (entry["worth"], entry["cost"]) == (1.0, 1.0) and entry["limit"] > 2


@pytest.mark.parametrize(("spread", "prunes"), [(0.3, False), (1.5, True)])
def test_auto_decides_on_both_sides_of_its_bar_and_says_so_before_the_pass(spread: float, prunes: bool) -> None:
    scores = np.exp(spread * np.random.default_rng(1).standard_normal(400)).astype(np.float32)
    pruner, remarks = trained(dict(type="auto", target_saving=0.5), 0, scores), Remarks()
    assert remarks.line(pruner) is None
    one_pass(pruner, scores)
    line = remarks.line(pruner)
    assert line is not None
    assert (pruner.limit >= 1.5) == prunes and (" prunes: " in line) == prunes
    one_pass(pruner, scores * np.float32(1.5) ** (np.arange(400) % 2))  # of another limit, on the same side
    assert (pruner.history[-1]["kept"] < 400) == prunes
    assert remarks.line(pruner) is None
    if not prunes:
        assert "% shorter" in line
        for _ in range(6):
            one_pass(pruner, scores)
        assert end_line(pruner).endswith("less than target_saving=0.5: " + pruner.policy.why_less)
    pruner = trained("auto", 2, scores)
    if not prunes:
        line = Remarks().line(pruner)
        assert line is not None and f"train {100 * (1 - 1 / pruner.limit):.1f}% shorter" in line
    exactly = trained(dict(type="auto", bar=pruner.limit), 2, scores)
    assert exactly.history[-1]["kept"] < 400
    above = trained(dict(type="auto", bar=np.nextafter(pruner.limit, 99)), 2, scores)
    assert above.history[-1]["kept"] == 400


@pytest.mark.parametrize("bar", [0.9, "1.5", float("nan"), float("inf"), None, True])
def test_a_bar_below_one_is_refused(bar: Any) -> None:
    with pytest.raises(ValueError, match="bar="):
        build_policy(dict(type="auto", bar=bar))


def test_many_samples_are_looked_at_in_no_rhythm() -> None:
    # Each image was cut into four, of which one is not empty.
    size = 2**19
    norms = np.where(np.arange(size) % 4 == 1, 1.0, 0.05).astype(np.float32)
    pruner = Pruner(EpochSchedule(size, 8, 64), build_policy("variance"), score="raw")
    pruner.record(torch.arange(size), torch.from_numpy(norms))
    pruner.store.flush()
    assert pruner.limit == pytest.approx(limit(norms), rel=0.02)
    found = pruner.begin_pass().worth
    assert found is not None and found.cost == pytest.approx(0.5, abs=1e-3) and found.worth > 0.9


@pytest.mark.parametrize(
    "norms",
    [lambda s: s * np.nan, lambda s: 1 / (s - s), lambda s: -s - 1, lambda s: s[:3], torch.from_numpy],
    ids=["NaN", "infinite", "negative", "of another shape", "a tensor"],
)
def test_what_a_users_score_calls_norms_is_looked_at(norms: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = trained("random", 1, unequal())
    monkeypatch.setattr(pruner.store.rule, "norms", norms)
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=r"norms\(\) of the score gave"):
        pruner.begin_pass()


def test_norms_whose_squares_vanish_have_a_limit() -> None:
    assert limit(np.array([1e-200, 3e-200])) == pytest.approx(5 / 4) and limit(np.zeros(3)) == 1


def test_a_cut_pass_pays_its_own_share() -> None:
    scores = unequal()
    pruner = Pruner(IterSchedule(N, 25, BATCH), build_policy(dict(type="variance", delta=1.0)), score="raw")
    pruner.record(torch.arange(N), torch.from_numpy(scores))
    pruner.store.flush()
    for _ in range(pruner.schedule.num_passes):
        one_pass(pruner, scores)
    assert [entry["cost"] for entry in pruner.history] == [entry["kept_ratio"] for entry in pruner.history]
