"""How much a policy prunes: by a target of the whole training, or by what a pass is worth."""

import numpy as np
import pytest
import torch

from infobatch_mm.core import EpochSchedule, IterSchedule, Pruner, Schedule, Snapshot, build_policy
from infobatch_mm.core.console import end_line
from infobatch_mm.core.rng import generator
from infobatch_mm.core.worth import worth

N, B = 400, 8


def walked(policy: object, schedule: Schedule) -> Pruner:
    """A training in which every sample has the same score at each visit."""
    pruner = Pruner(schedule, build_policy(policy), seed=3, score="raw")
    scores = torch.rand(N, generator=generator(4)) ** 3
    while not pruner.finished:
        plan = pruner.begin_pass()
        pruner.record(plan.indices, scores[plan.indices])
        pruner.advance(len(plan))
        pruner.finish_pass()
    return pruner


SCHEDULES = {
    "8 epochs": EpochSchedule(N, 8, B),
    "20 epochs": EpochSchedule(N, 20, B),
    "7.3 passes": IterSchedule(N, 365, B),
    "steps": EpochSchedule(N, None, B, max_steps=333),
}


@pytest.mark.parametrize("delta", [0.6, 0.875, 1.0])
@pytest.mark.parametrize("target", [0.1, 0.3])
@pytest.mark.parametrize("name", ["variance", "infobatch", "random"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_target_is_met_within_one_percent_of_the_visits_or_the_end_says_so(
    schedule: str, name: str, target: float, delta: float
):
    pruner = walked(dict(type=name, target_saving=target, delta=delta), SCHEDULES[schedule])
    if name == "infobatch" and (target, delta) == (0.3, 0.6) and pruner.saved_ratio < 0.29:
        # Nine of ten samples below the mean, which are two of three, in less than half of the passes.
        assert "less than target_saving=0.3: the policy could skip no more" in end_line(pruner)
        return
    assert pruner.saved_ratio == pytest.approx(target, abs=0.01) and "target" not in end_line(pruner)


def test_what_infobatch_cannot_skip_it_does_not_skip():
    policy = dict(type="infobatch", target_saving=0.75, delta=1.0)  # two of three samples are below the mean
    pruner = walked(policy, SCHEDULES["20 epochs"])
    assert 0.5 < pruner.saved_ratio < 0.7
    assert max(float(plan.weights.max()) for plan in [pruner.begin_pass()]) <= 20


def test_a_target_that_was_fallen_short_of_is_made_up_for():
    policy = build_policy(dict(type="random", target_saving=0.4, delta=1.0))
    seen = torch.ones(N, dtype=torch.bool)

    def visits(saved: float) -> int:
        snapshot = Snapshot(torch.rand(N), seen, seen.int(), 0.5, pass_index=4, pass_share=0.125, saved=saved)
        return len(policy.plan(snapshot, generator(0), 1))

    assert visits(0.2) == round(N * (1 - 0.2 / 0.5)) and visits(0.1) == round(N * (1 - 0.3 / 0.5))
    assert visits(0.3) == round(N * (1 - 0.1 / 0.5))


@pytest.mark.parametrize("least", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("name", ["variance", "infobatch", "random"])
def test_a_pass_is_worth_what_is_asked_and_hardly_more(name: str, least: float):
    policy = build_policy(dict(type=name, min_worth=least, delta=1.0))
    scores = torch.rand(N, generator=generator(4)) ** 3
    seen = torch.ones(N, dtype=torch.bool)
    found = policy.chances(Snapshot(scores, seen, seen.int(), 0.5))
    assert found is not None
    reached = worth(scores.numpy(), found.by_sample())
    bound = 1 - policy.largest_ratio
    assert reached >= least - 1e-6 and (reached <= least + 1e-3 or found.by_sample().min() <= bound + 1e-6)


def test_pruning_by_gradients_saves_more_than_by_chance_for_what_it_is_worth():
    scores = torch.rand(N, generator=generator(4)) ** 3
    seen = torch.ones(N, dtype=torch.bool)
    costs = {}
    for name in ("variance", "random"):
        found = build_policy(dict(type=name, min_worth=0.8)).chances(Snapshot(scores, seen, seen.int(), 0.5))
        costs[name] = float(np.mean(found.by_sample()))
    assert costs["random"] == pytest.approx(0.8, abs=1e-3) and costs["variance"] < 0.65


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(target_saving=1.0),
            r"target_saving=1.0 is outside \(0, 1\): it is the share of the whole training's visits",
        ),
        (dict(min_worth="0.9"), r"min_worth='0.9' is text: leave out the quotes"),
        (dict(target_saving=0.3, min_worth=0.9), "target_saving=0.3 and min_worth=0.9: both say how much"),
        (dict(prune_ratio=0.4, min_worth=0.9), "prune_ratio=0.4 and min_worth=0.9: both say how much"),
        (dict(rescale=True), "rescale=True: use 'unbiased'"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build_policy(dict(type="random", **arguments))


@pytest.mark.parametrize(
    ("policy", "epochs"),
    [
        (dict(type="variance", target_saving=0.5, delta=1.0), 2),
        (dict(type="random", target_saving=0.5, delta=0.5), 8),
        (dict(type="infobatch", target_saving=0.1), 1),
    ],
)
def test_a_training_that_is_too_short_for_its_target_is_refused(policy: dict, epochs: int):
    with pytest.raises(ValueError, match=rf"target_saving=0\.\d cannot be met: .* in {epochs} passes"):
        Pruner(EpochSchedule(N, epochs, B), build_policy(policy))
