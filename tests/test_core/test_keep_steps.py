"""``keep="steps"``: pruned passes make the steps of full ones, on smaller batches, at learning rates to match."""

from __future__ import annotations

import io
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from infobatch_mm.core import EpochSchedule, IterSchedule, Plan, Pruner, PruningPolicy, Schedule, build_policy
from infobatch_mm.core.lr_factor import LearningRateFactor, lr_factor
from infobatch_mm.policies import InfoBatchPolicy, RandomPolicy, VariancePolicy

MakeSchedule = Callable[[int, int, int], Schedule]


def with_tail(num_samples: int, passes: int, batch: int) -> Schedule:
    return EpochSchedule(num_samples, passes, batch)


def drop_last(num_samples: int, passes: int, batch: int) -> Schedule:
    return EpochSchedule(num_samples, passes, batch, num_samples // batch)


def in_steps(num_samples: int, passes: int, batch: int) -> Schedule:
    """Whose last pass is partial."""
    steps = math.ceil(num_samples / batch)
    return EpochSchedule(num_samples, None, batch, max_steps=max(1, passes * steps - steps // 3))


def by_iteration(num_samples: int, passes: int, batch: int) -> Schedule:
    """Whose last pass is partial, too."""
    return IterSchedule(num_samples, max(1, passes * num_samples // batch - num_samples // (3 * batch)), batch)


SCHEDULES: list[MakeSchedule] = [with_tail, drop_last, in_steps, by_iteration]
POLICIES: dict[str, Callable[..., PruningPolicy]] = {
    "infobatch": InfoBatchPolicy,
    "variance": VariancePolicy,
    "random": RandomPolicy,
}


def losses_of(indices: torch.Tensor, pass_index: int) -> torch.Tensor:
    """A loss that depends on the sample and the pass alone, some of them much larger than others."""
    return (((indices * 7919 + pass_index * 104729 + 13) % 1009).float() / 1009) ** 4 + 0.01


def batch_of(pruner: Pruner) -> list[tuple[int, float]]:
    """Visit the next batch of the pass in flight, and end it with its last."""
    plan = pruner.begin_pass()
    indices = plan.indices[pruner.visited : pruner.visited + pruner.pass_batch]
    weights = pruner.weights(indices)
    pruner.record(indices, losses_of(indices, pruner.pass_index))
    pruner.advance(len(indices))
    visits = list(zip(indices.tolist(), weights.tolist(), strict=True))
    if pruner.batches_done == pruner.batches:
        pruner.finish_pass()
    return visits


def whole_pass(pruner: Pruner) -> tuple[Plan, list[list[tuple[int, float]]]]:
    """The plan of the pass in flight, and its batches."""
    plan, current, batches = pruner.begin_pass(), pruner.pass_index, []
    while pruner.pass_index == current:
        batches.append(batch_of(pruner))
    return plan, batches


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---- counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("make_schedule", SCHEDULES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("make_policy", POLICIES.values(), ids=POLICIES)
def test_a_pruned_pass_makes_the_steps_of_a_full_one_in_batches_of_one_size(
    make_policy: Callable[..., PruningPolicy], make_schedule: MakeSchedule, world: int
):
    rng = random.Random(world)
    smaller = 0
    for _ in range(12):
        batch = world * rng.randint(2, 9)
        num_samples = rng.randint(batch, 12 * batch)
        schedule = make_schedule(num_samples, 5, batch)
        pruner = Pruner(schedule, make_policy(0.5, 1.0, keep="steps"))
        pruner.share_batches(world)
        while not pruner.finished:
            expected = schedule.full_batches(pruner.pass_index)
            plan, batches = whole_pass(pruner)
            assert len(batches) == expected
            visited = [index for each in batches for index, _ in each]
            assert len(set(visited)) == len(visited)
            if plan.pruned:
                assert plan.batch_size is not None and plan.batch_size <= batch
                assert plan.batch_size % world == 0
                assert {len(each) for each in batches} == {plan.batch_size}
                smaller += plan.batch_size < batch
    assert smaller > 12


def test_no_batch_is_larger_than_a_full_one_where_a_pass_leaves_much_out():
    """Of 31 samples an iteration loop with batches of 16 makes one step: a pruned pass of 25 would have one of 25."""
    pruner = Pruner(IterSchedule(31, 20, 16), RandomPolicy(0.2, 1.0, keep="steps"))
    pruner.share_batches(1)
    while not pruner.finished:
        plan = whole_pass(pruner)[0]
        assert (len(plan), plan.batch_size) == (16, 16)


def test_a_batch_of_the_full_size_leaves_learning_rates_alone():
    pruner = Pruner(IterSchedule(31, 20, 16), RandomPolicy(0.2, 1.0, keep="steps"))
    assert pruner.begin_pass().pruned
    assert pruner.lr_factor() == 1.0


@pytest.mark.parametrize("make_schedule", SCHEDULES, ids=lambda make: make.__name__)
def test_schedulers_stand_where_the_unpruned_run_has_them_at_every_pass(make_schedule: MakeSchedule):
    """As many batches as a full pass, so that a step of the optimiser is one of its schedule."""
    schedule = make_schedule(101, 6, 8)
    pruner = Pruner(schedule, RandomPolicy(0.5, 1.0, keep="steps"))
    pruner.share_batches(1)
    while not pruner.finished:
        current = pruner.pass_index
        pruner.begin_pass()
        due = [schedule.steps_at(current, done, pruner.batches) for done in range(pruner.batches + 1)]
        assert due[0] == schedule.steps_before(current) and due[-1] == schedule.steps_before(current + 1)
        # An iteration loop's remainder of N mod B gives some step a second one, as in full passes.
        assert sum(after - before != 1 for before, after in itertools.pairwise(due)) <= 1
        whole_pass(pruner)


@pytest.mark.parametrize("make_schedule", [with_tail, by_iteration], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", list(POLICIES))
def test_target_saving_is_met_within_a_hundredth_of_the_visits(name: str, make_schedule: MakeSchedule):
    """Though each pass saves a multiple of a sixteenth."""
    for num_samples, passes in ((320, 12), (333, 20), (410, 9)):
        pruner = Pruner(make_schedule(num_samples, passes, 16), POLICIES[name](target_saving=0.4, keep="steps"))
        pruner.share_batches(1)
        while not pruner.finished:
            whole_pass(pruner)
        assert pruner.saved_ratio == pytest.approx(0.4, abs=0.01), (num_samples, passes)


# ---- weights --------------------------------------------------------------------------------------------


def expected_step(policy: PruningPolicy, values: torch.Tensor, draws: int) -> tuple[float, float, float]:
    """Mean and its standard error of the first batch's weighted mean of ``values`` over draws; and the share C."""
    found, share = [], 0.0
    for seed in range(draws):
        pruner = Pruner(EpochSchedule(len(values), 3, 8), policy, seed)
        pruner.share_batches(1)
        every = torch.arange(len(values))
        pruner.record(every, losses_of(every, 0))
        pruner.advance(len(values))
        pruner.finish_pass()
        plan = pruner.begin_pass()
        assert plan.pruned and plan.batch_size is not None
        share = plan.batch_size / 8
        indices, weights = plan.indices[: plan.batch_size], plan.weights[: plan.batch_size]
        found.append(float((weights * values[indices]).mean()))
    means = torch.tensor(found, dtype=torch.float64)
    return float(means.mean()), float(means.std() / math.sqrt(draws)), share


@pytest.mark.parametrize("name", ["infobatch", "random"])
def test_the_expected_step_is_the_mean_of_all_samples(name: str):
    """Over all that is drawn: which samples, and which of them make the first batch."""
    values = losses_of(torch.arange(48), 0) * 3 - 1
    mean, error, share = expected_step(POLICIES[name](0.5, 1.0, keep="steps"), values, 800)
    true = float(values.mean())
    assert 0.4 < share < 1
    assert abs(mean - true) < 4 * error
    assert 4 * error < abs(true) * (1 / share - 1) / 2  # or the test could not tell it from 1/pi


def test_the_expected_step_of_unequal_chances_is_nearly_the_mean_of_all_samples():
    """Weights divided by their own mean: a ratio of two sums, biased by the order of one over the visits."""
    values = losses_of(torch.arange(48), 0)
    mean, error, share = expected_step(VariancePolicy(0.5, 1.0, keep="steps"), values, 800)
    assert share == 0.5
    assert abs(mean - float(values.mean())) < 4 * error + 0.03 * float(values.mean())


def test_unbiased_weights_make_every_step_larger_by_the_inverse_of_the_share():
    values = losses_of(torch.arange(48), 0) * 3 - 1
    mean, error, share = expected_step(RandomPolicy(0.5, 1.0, keep="steps", rescale="unbiased"), values, 800)
    assert share == 0.5
    assert abs(mean - float(values.mean()) / share) < 4 * error
    assert 4 * error < abs(float(values.mean())) * (1 / share - 1) / 2  # or the test could not tell


# ---- settings -------------------------------------------------------------------------------------------


def test_settings_name_what_differs_from_the_default_and_make_the_same_policy_again():
    assert "keep" not in InfoBatchPolicy().settings() and InfoBatchPolicy().rescale == "unbiased"
    plain = InfoBatchPolicy(keep="steps")
    assert plain.settings() == {"policy": "infobatch", "prune_ratio": 0.5, "delta": 0.875, "keep": "steps"}
    assert (plain.rescale, plain.lr_rule) == ("step", "sqrt")
    for options in ({}, {"lr_rule": "linear"}, {"lr_rule": "none", "rescale": "unbiased"}, {"rescale": "step"}):
        policy = InfoBatchPolicy(keep="steps", **options)  # type: ignore[arg-type]
        again = build_policy(eval(repr(policy)))
        assert again.settings() == policy.settings()
        assert (again.rescale, again.lr_rule) == (policy.rescale, policy.lr_rule)
        assert {"keep": "steps", **options}.items() <= {**vars(policy)}.items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "visits"}, "keep='visits': use 'batch', fewer steps"),
        ({"keep": "steps", "lr_rule": "cubic"}, r"lr_rule='cubic': use one of \['none', 'sqrt', 'linear'\]"),
        ({"lr_rule": "sqrt"}, "lr_rule='sqrt' is for the smaller batches of keep='steps', and keep='batch'"),
    ],
)
def test_what_is_unknown_or_without_effect_is_refused(options: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        build_policy(dict(type="random", **options))


def test_batches_that_cannot_be_smaller_are_refused():
    pruner = Pruner(EpochSchedule(40, 4, 4), RandomPolicy(keep="steps"))
    with pytest.raises(ValueError, match=r"in multiples of 4 .* and the global batch_size=4 is the smallest"):
        pruner.share_batches(4)


def test_a_saving_beyond_the_smallest_batch_is_refused():
    """Two samples for each process: a pass saves a half at most."""
    pruner = Pruner(EpochSchedule(80, 10, 8), RandomPolicy(target_saving=0.6, delta=1.0, keep="steps"))
    with pytest.raises(ValueError, match=r"target_saving=0.6 cannot be met: at most 0.500"):
        pruner.share_batches(4)


# ---- state ----------------------------------------------------------------------------------------------


def run_of(world: int = 1, batch: int = 8, make_schedule: MakeSchedule = with_tail) -> Pruner:
    pruner = Pruner(make_schedule(70, 6, batch), InfoBatchPolicy(0.6, 1.0, keep="steps"))
    pruner.share_batches(world)
    return pruner


@pytest.mark.parametrize("make_schedule", SCHEDULES, ids=lambda make: make.__name__)
def test_a_run_killed_at_any_step_goes_on_with_the_same_batches_and_rates(make_schedule: MakeSchedule):
    straight = run_of(make_schedule=make_schedule)
    seen: list[tuple[list[tuple[int, float]], float]] = []
    states = []
    while not straight.finished:
        states.append(through_a_file(straight.state_dict()))
        straight.begin_pass()
        factor = straight.lr_factor()
        seen.append((batch_of(straight), factor))
    assert {factor for _, factor in seen} > {1.0}
    for start in range(0, len(states), 5):
        resumed = run_of(make_schedule=make_schedule)
        assert resumed.load_state_dict(states[start])
        rest = []
        while not resumed.finished:
            resumed.begin_pass()
            factor = resumed.lr_factor()
            rest.append((batch_of(resumed), factor))
        assert rest == seen[start:]


def in_a_pruned_pass(world: int = 1) -> Pruner:
    pruner = run_of(world)
    whole_pass(pruner)
    for _ in range(3):
        batch_of(pruner)
    assert pruner.begin_pass().batch_size in range(2, 8)
    return pruner


def test_a_pass_that_more_processes_cannot_share_is_drawn_again():
    pruner = in_a_pruned_pass()
    plan = pruner.begin_pass()
    assert plan.batch_size is not None and plan.batch_size % 4
    resumed = run_of(world=4)
    assert not resumed.load_state_dict(through_a_file(pruner.state_dict()))
    again = resumed.begin_pass()
    assert again.batch_size == 4 and resumed.visited % 4 == 0
    assert resumed.batches_done in (2, 3, 4)  # of nine: near where it was
    assert torch.equal(resumed.store.values, pruner.store.values)


def test_a_pass_that_as_many_processes_can_share_goes_on():
    pruner = in_a_pruned_pass(world=2)
    resumed = run_of(world=2)
    assert resumed.load_state_dict(through_a_file(pruner.state_dict()))
    assert torch.equal(resumed.begin_pass().indices, pruner.begin_pass().indices)
    assert (resumed.begin_pass().batch_size or 1) % 2 == 0 and resumed.visited == pruner.visited


@pytest.mark.parametrize("batch", [0, -1, 1.5, "3", True, 1000])
def test_a_damaged_batch_size_is_refused(batch: Any):
    state = in_a_pruned_pass().state_dict()
    state["plan"]["batch_size"] = batch
    with pytest.raises(ValueError, match="damaged at 'plan'"):
        run_of().load_state_dict(state)


def test_a_run_that_keeps_its_batches_does_not_go_on_from_one_that_keeps_its_steps():
    state = in_a_pruned_pass().state_dict()
    other = Pruner(with_tail(70, 6, 8), InfoBatchPolicy(0.6, 1.0))
    with pytest.raises(ValueError, match=r"was pruned with \{.*'keep': 'steps'"):
        other.load_state_dict(state)


# ---- learning rates -------------------------------------------------------------------------------------


class Share:
    """A factor that tests set."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def now(self) -> float:
        return self.factor


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda groups: SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda groups: AdamW(groups, lr=0.1, weight_decay=0.1),
}


def model_and(make: Callable[[Any], Optimizer]) -> tuple[list[torch.nn.Parameter], Optimizer]:
    parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 5)), torch.nn.Parameter(torch.linspace(2, 3, 4))]
    return parameters, make([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.03}])


def step(parameters: list[torch.nn.Parameter], optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    sum((p**2).sum() for p in parameters).backward()  # type: ignore[union-attr]
    optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_factor_is_there_in_the_step_and_gone_after_it(make: Callable[[Any], Optimizer]):
    """Beside a twin whose groups are given the multiplied rate for each step by hand."""
    (ours, optimizer), (theirs, twin) = model_and(make), model_and(make)
    share = Share()
    rates = LearningRateFactor([optimizer], share.now)
    schedulers = [ExponentialLR(each, 0.9) for each in (optimizer, twin)]
    for factor in (1.0, 0.5, 0.25, 1.0, 0.75):
        share.factor = factor
        before = [group["lr"] for group in optimizer.param_groups]
        step(ours, optimizer)
        assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, before, strict=True))
        for group in twin.param_groups:
            group["lr"] *= factor
        step(theirs, twin)
        for group, rate in zip(twin.param_groups, before, strict=True):
            group["lr"] = rate
        for scheduler in schedulers:
            scheduler.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
    rates.remove()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    share.factor = 0.5
    step(ours, optimizer)
    step(theirs, twin)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_rate_that_is_a_tensor_is_multiplied_once_and_put_back_to_the_bit():
    rate = torch.tensor(0.1)
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    optimizer = AdamW([{"params": [each]} for each in parameters], lr=rate)
    for group in optimizer.param_groups:
        group["lr"] = rate  # one for both
    seen: list[float] = []
    share = Share(0.3)
    rates = LearningRateFactor([optimizer], share.now)
    optimizer.register_step_pre_hook(lambda *_: seen.append(float(rate)))
    for _ in range(3):
        step(parameters, optimizer)
    assert seen == pytest.approx([0.03] * 3)
    assert torch.equal(rate, torch.tensor(0.1)) and all(group["lr"] is rate for group in optimizer.param_groups)
    rates.remove()


class Stepwise(SGD):
    """An optimiser of a user's that calls its parent's step, whose hooks torch then calls a second time."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)


def test_a_step_within_a_step_is_multiplied_once():
    SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)  # torch hooks a class where it makes its first object
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = Stepwise([parameter], lr=0.25)
    share = Share(0.5)
    rates = LearningRateFactor([optimizer], share.now)
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert parameter.item() == 1 - 0.25 * 0.5
    assert optimizer.param_groups[0]["lr"] == 0.25
    rates.remove()


def test_a_step_that_fails_leaves_the_next_one_its_rate():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = SGD([parameter], lr=0.25)
    share = Share(0.5)
    rates = LearningRateFactor([optimizer], share.now)

    def fails() -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        optimizer.step(fails)
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert parameter.item() == 1 - 0.25 * 0.5 and optimizer.param_groups[0]["lr"] == 0.25
    with pytest.raises(RuntimeError):
        optimizer.step(fails)
    rates.remove()
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_the_factor_of_what_is_gone_is_one():
    """An InfoBatch that was replaced must not go on multiplying the rates of an optimiser that lives on."""
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = SGD([parameter], lr=0.25)
    share = Share(0.5)
    LearningRateFactor([optimizer], share.now)
    del share
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert parameter.item() == 0.75


def test_an_optimizer_without_a_rate_is_refused():
    optimizer = SGD([torch.nn.Parameter(torch.ones(1))], lr=0.25)
    optimizer.param_groups[0]["lr"] = None  # as where an optimiser finds its steps itself
    with pytest.raises(ValueError, match="SGD has no learning rate in its parameter groups"):
        LearningRateFactor([optimizer], Share().now)
    with pytest.raises(ValueError, match=r"around the steps of a torch\.optim\.Optimizer, got Share"):
        LearningRateFactor([Share()], Share().now)


def test_rules_are_powers_of_the_share():
    assert [lr_factor(rule, 0.25) for rule in ("none", "sqrt", "linear")] == [1.0, 0.5, 0.25]
    pruner = in_a_pruned_pass()
    share = pruner.begin_pass().batch_size / 8  # type: ignore[operator]
    assert pruner.lr_factor() == pytest.approx(math.sqrt(share)) and share < 1
