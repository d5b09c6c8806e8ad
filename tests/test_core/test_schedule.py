"""Schedules: passes of pruned data on the host's clock."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from reference import steps_after_pass

from infobatch_mm.core import EpochSchedule, IterSchedule, Plan, Pruner, full_plan, thinned_plan
from infobatch_mm.policies import InfoBatchPolicy


def cases(count: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """Random (N, B, max_iters) with B <= N, small and edge cases among them."""
    rng = random.Random(seed)
    drawn = [(1, 1, 1), (1, 1, 9), (7, 7, 1), (7, 7, 20), (7, 6, 20), (10, 3, 1), (10, 3, 100), (100, 99, 3)]
    for _ in range(count):
        num_samples = rng.randint(1, 120)
        drawn.append((num_samples, rng.randint(1, num_samples), rng.randint(1, 300)))
    return drawn


def plan_of(schedule: IterSchedule, rng: random.Random, pruned: bool) -> Plan:
    """A plan as a policy draws it: any multiple of the batch size of visits, or all of them."""
    n, b = schedule.num_samples, schedule.batch_size
    visits = rng.randint(1, n // b) * b
    if not pruned or visits == n:
        return full_plan(n, torch.Generator().manual_seed(rng.randrange(2**31)))
    candidates = torch.zeros(n, dtype=torch.bool)
    candidates[: n - visits + 1] = True
    return thinned_plan(candidates, 1, torch.Generator().manual_seed(rng.randrange(2**31)), threshold=1.0)


def test_steps_at_pass_ends_are_those_of_the_host():
    for n, b, max_iters in cases(250):
        schedule = IterSchedule(n, max_iters, b)
        total = max_iters * b
        for p in range(schedule.num_passes):
            expected = math.floor(min((p + 1) * n, total) / b)
            for batches in (1, 2, 7):
                assert schedule.steps_at(p, batches, batches) == expected
            assert schedule.steps_at(p, 0, 5) == math.floor(min(p * n, total) / b)


def test_steps_at_pass_ends_agree_with_a_walk_over_the_samples():
    for n, b, max_iters in cases(15, seed=1):
        schedule = IterSchedule(n, max_iters, b)
        for p in range(0, schedule.num_passes, max(1, schedule.num_passes // 5)):
            assert schedule.steps_at(p, 1, 1) == steps_after_pass(p + 1, n, b, max_iters)


def test_steps_never_fall_never_overshoot_and_end_at_the_total():
    rng = random.Random(2)
    for n, b, max_iters in cases(150, seed=2):
        schedule = IterSchedule(n, max_iters, b)
        last = 0
        for p in range(schedule.num_passes):
            batches = schedule.batches(schedule.fit(plan_of(schedule, rng, rng.random() < 0.7), p), p)
            for done in range(batches + 1):
                steps = schedule.steps_at(p, done, batches)
                assert last <= steps <= schedule.total_steps
                last = steps
        assert last == schedule.total_steps == max_iters
        assert schedule.steps_at(schedule.num_passes, 1, 1) == max_iters  # nor beyond the end


def test_steps_advance_evenly_within_a_pass():
    schedule = IterSchedule(100, 50, 10)
    for batches in range(1, 11):
        taken = [schedule.steps_at(0, done, batches) for done in range(batches + 1)]
        gains = {after - before for before, after in itertools.pairwise(taken)}
        assert max(gains) - min(gains) <= 1


def test_iterations_with_any_pruning_never_exceed_the_hosts():
    rng = random.Random(3)
    for n, b, max_iters in cases(250, seed=3):
        schedule = IterSchedule(n, max_iters, b)
        iterations = 0
        for p in range(schedule.num_passes):
            plan = schedule.fit(plan_of(schedule, rng, rng.random() < 0.5), p)
            assert len(plan) % b == 0 and len(plan) >= b  # full batches only
            assert schedule.batches(plan, p) == len(plan) // b
            iterations += len(plan) // b
        assert 1 <= iterations <= max_iters, (n, b, max_iters)


def test_unpruned_passes_leave_out_the_remainder_only():
    for n, b, max_iters in cases(100, seed=4):
        schedule = IterSchedule(n, max_iters, b)
        for p in range(schedule.num_passes):
            plan = schedule.fit(full_plan(n, torch.Generator().manual_seed(p)), p)
            span = min(n, max_iters * b - p * n)
            assert len(plan) == max(1, span // b) * b
            assert schedule.full_batches(p) == len(plan) // b
            assert schedule.full_visits(p) == span
            assert not plan.pruned


def test_full_spans_add_up_to_the_hosts_samples():
    for n, b, max_iters in cases(100, seed=5):
        schedule = IterSchedule(n, max_iters, b)
        assert sum(schedule.full_visits(p) for p in range(schedule.num_passes)) == max_iters * b
        assert schedule.num_passes == math.ceil(max_iters * b / n)


def test_remainder_left_out_is_random():
    schedule = IterSchedule(10, 100, 4)
    left_out = torch.zeros(10)
    for p in range(600):
        plan = schedule.fit(full_plan(10, torch.Generator().manual_seed(p)), 0)
        assert len(plan) == 8
        left_out += 1
        left_out[plan.indices] -= 1
    assert (left_out / 600 - 0.2).abs().max() < 4.5 * math.sqrt(0.2 * 0.8 / 600)


def test_partial_last_pass_keeps_the_share_of_its_span():
    schedule = IterSchedule(100, 15, 10)  # 150 samples: a pass and a half
    candidates = torch.arange(100) < 80
    plan = thinned_plan(candidates, 40, torch.Generator().manual_seed(0))
    assert schedule.num_passes == 2
    assert len(schedule.fit(plan, 0)) == 60
    assert len(schedule.fit(plan, 1)) == 30


def test_batch_larger_than_the_data_is_refused_with_both_numbers():
    with pytest.raises(ValueError) as refused:
        IterSchedule(13, 100, 64)
    assert "13" in str(refused.value) and "64" in str(refused.value)


@pytest.mark.parametrize("max_iters", [0, -5])
def test_training_without_iterations_is_refused(max_iters: int):
    with pytest.raises(ValueError, match=str(max_iters)):
        IterSchedule(13, max_iters, 4)


@pytest.mark.parametrize("num_epochs", [0, -5])
def test_training_without_epochs_is_refused(num_epochs: int):
    with pytest.raises(ValueError, match=str(num_epochs)):
        EpochSchedule(13, num_epochs, 4)


@pytest.mark.parametrize(("epoch_batches", "length"), [(None, 4), (3, 3), (4, 4), (9, 9)])
def test_epoch_schedule_takes_whole_epochs_of_steps(epoch_batches: int | None, length: int):
    schedule = EpochSchedule(13, 5, 4, epoch_batches)
    assert schedule.num_passes == 5 and schedule.total_steps == 5 * length
    for p in range(5):
        last = p * length
        for batches in (1, 2, 3, 4):
            assert schedule.steps_at(p, 0, batches) == p * length
            assert schedule.steps_at(p, batches, batches) == (p + 1) * length
        for done in range(3):
            assert last <= schedule.steps_at(p, done, 2) <= schedule.total_steps
            last = schedule.steps_at(p, done, 2)
    assert schedule.steps_at(5, 1, 1) == 5 * length


def test_epoch_schedule_keeps_plans_whole():
    schedule = EpochSchedule(13, 5, 4)
    plan = full_plan(13, torch.Generator().manual_seed(0))
    assert schedule.fit(plan, 2) is plan
    assert schedule.batches(plan, 2) == 4


def test_progress_is_the_share_of_full_data():
    for n, b, max_iters in cases(60, seed=6):
        schedule = IterSchedule(n, max_iters, b)
        for p in range(schedule.num_passes + 2):
            assert schedule.progress(p) == min(p * n, max_iters * b) / (max_iters * b)
    assert [EpochSchedule(7, 4, 2).progress(p) for p in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("shuffle", [True, False])
def test_whole_pruned_runs_keep_the_iteration_contract(shuffle: bool):
    rng = random.Random(7)
    pruned = 0
    for n, b, max_iters in cases(40, seed=7):
        schedule = IterSchedule(n, max_iters, b)
        pruner = Pruner(schedule, InfoBatchPolicy(rng.uniform(0, 0.95), 1.0), seed=n, shuffle=shuffle)
        iterations, last = 0, 0
        while not pruner.finished:
            plan, p = pruner.begin_pass(), pruner.pass_index
            pruned += plan.pruned
            assert len(plan) % b == 0
            for done, indices in enumerate(plan.indices.split(b), 1):
                pruner.record(indices, torch.rand(b, generator=torch.Generator().manual_seed(iterations)))
                pruner.advance(b)
                iterations += 1
                assert last <= schedule.steps_at(p, done, pruner.batches) <= max_iters
                last = schedule.steps_at(p, done, pruner.batches)
            assert last == math.floor(min((p + 1) * n, max_iters * b) / b)
            pruner.finish_pass()
        assert iterations <= max_iters and last == max_iters
    assert pruned > 50


@pytest.mark.parametrize("accumulated", [1, 2, 3])
def test_a_training_of_so_many_steps_ends_at_them(accumulated):
    rng = random.Random(accumulated)
    for n, b, max_steps in cases(200, seed=3):
        epoch_batches = math.ceil(n / b)
        schedule = EpochSchedule(n, None, b, epoch_batches, accumulated, max_steps=max_steps)
        # The unpruned loop, step by step: every `accumulated` batches, and at an epoch's end.
        steps, batches, visits, ends = 0, 0, 0, []
        while steps < max_steps:
            left = n
            for batch in range(epoch_batches):
                visits, left, batches = visits + min(b, left), left - min(b, left), batches + 1
                steps += (batch + 1) % accumulated == 0 or batch + 1 == epoch_batches
                if steps == max_steps and ((batch + 1) % accumulated == 0 or batch + 1 == epoch_batches):
                    break
            ends.append((steps, batches, visits))
        assert schedule.num_passes == len(ends)
        assert schedule.total_steps == max_steps == schedule.steps_before(schedule.num_passes)
        assert sum(schedule.full_batches(p) for p in range(schedule.num_passes)) == batches
        assert sum(schedule.full_visits(p) for p in range(schedule.num_passes)) == visits
        for p, (done, *_) in enumerate(ends):
            assert schedule.steps_before(p + 1) == schedule.steps_at(p, 1, 1) == done
        last = schedule.num_passes - 1
        fitted = schedule.fit(full_plan(n, torch.Generator().manual_seed(0)), last)
        assert len(fitted) == schedule.full_visits(last)
        pruned = schedule.fit(plan_of(IterSchedule(n, 1, b), rng, pruned=True), last)
        assert 0 < len(pruned) <= schedule.full_visits(last)
        assert 0 <= schedule.progress(last) < 1 == schedule.progress(last + 1)


def test_steps_take_the_place_of_epochs():
    assert EpochSchedule(12, 100, 4, max_steps=3).num_passes == 1
    assert EpochSchedule(12, 100, 4, max_steps=4).num_passes == 2
    with pytest.raises(ValueError, match="max_train_steps=0: the training needs at least one step"):
        EpochSchedule(12, 100, 4, max_steps=0)
