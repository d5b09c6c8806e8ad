"""Samples without a valid pixel: counted, remembered, and corrected for."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch

from infobatch_mm.core import EpochSchedule, Pruner
from infobatch_mm.core.blanks import blank_factor
from infobatch_mm.policies import InfoBatchPolicy


def expected_share(valid: tuple[bool, ...], sample: int, batch: int) -> Fraction:
    """E[1 / valid samples in the batch | the sample is in it], over all batches of so many."""
    others = [i for i in range(len(valid)) if i != sample]
    batches = [[sample, *rest] for rest in itertools.combinations(others, batch - 1)]
    return sum(Fraction(1, sum(valid[i] for i in each)) for each in batches) / len(batches)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_the_factor_is_that_of_all_batches(batch: int):
    for size, kept in itertools.product(range(batch, 8), range(batch, 8)):
        if kept > size:
            continue
        for blank, blank_kept in itertools.product(range(size), range(kept)):
            if blank_kept > blank or kept - blank_kept > size - blank:
                continue
            valid, valid_kept = ((True,) * (n - k) + (False,) * k for n, k in ((size, blank), (kept, blank_kept)))
            expected = expected_share(valid, 0, batch) / expected_share(valid_kept, 0, batch)
            if blank == 0:
                assert expected == 1
            assert blank_factor(size, blank, kept, blank_kept, batch) == pytest.approx(float(expected), rel=1e-12)


def test_the_factor_of_large_data_is_finite():
    factor = blank_factor(10**9, 8 * 10**8, 9 * 10**8, 8 * 10**8, 16)
    assert factor == pytest.approx((1 / 0.2 * (1 - 0.8**16)) / (9 * (1 - (8 / 9) ** 16)), rel=1e-6)
    assert blank_factor(10, 10, 10, 10, 2) == blank_factor(10, 0, 5, 0, 2) == 1.0


def test_expected_gradient_of_a_pruned_pass_is_that_of_a_full_one():
    """Over all draws and all orders: what blank samples do to the normaliser is undone to the bit of a float."""
    blank, batch = {5, 6}, 2
    pruner = Pruner(EpochSchedule(7, 10, batch), InfoBatchPolicy(0.5, 1.0))
    pruner.begin_pass()
    losses = torch.tensor([1.0, 1.0, 1.0, 5.0, 5.0, 0.0, 0.0])
    valid = torch.tensor([i not in blank for i in range(7)])
    pruner.record(torch.arange(7), losses, valid)
    pruner.advance(7)
    pruner.finish_pass()
    assert pruner.unscored == 2
    expected = 5 * expected_share(tuple(valid.tolist()), 0, batch)
    totals = []
    for seed in range(40):  # two of samples 0, 1, 2 are drawn; which ones is all that a seed decides
        pruner.seed, pruner.plan = seed, None
        plan = pruner.begin_pass()
        assert plan.pruned and blank <= set(plan.indices.tolist())
        kept_valid = tuple(i not in blank for i in plan.indices.tolist())
        factor = pruner.blank_factor(batch)
        shares = [
            float(expected_share(kept_valid, at, batch)) * float(weight) * factor
            for at, weight in enumerate(plan.weights)
            if kept_valid[at]
        ]
        totals.append(sum(shares))
    assert totals == pytest.approx([float(expected)] * len(totals), rel=1e-6)
    assert factor < 1


def test_a_pass_in_flight_keeps_its_factor_over_what_it_finds_out_and_a_resume():
    def fresh() -> Pruner:
        return Pruner(EpochSchedule(12, 10, 2), InfoBatchPolicy(0.5, 1.0))

    pruner = fresh()
    pruner.begin_pass()
    losses = torch.tensor([1.0] * 6 + [5.0] * 3 + [0.0] * 3)
    pruner.record(torch.arange(12), losses, torch.arange(12) < 9)
    pruner.advance(12)
    pruner.finish_pass()
    assert pruner.begin_pass().blanks == (3, 3)
    factor = pruner.blank_factor(2)
    first = pruner.plan.indices[:2]
    pruner.record(first, torch.ones(2))  # whatever it was, it has a score now
    pruner.advance(2)
    pruner.store.flush()
    assert pruner.blank_factor(2) == factor < 1
    resumed = fresh()
    resumed.load_state_dict(pruner.state_dict())
    assert resumed.blank_factor(2) == factor


def test_full_passes_are_not_corrected():
    pruner = Pruner(EpochSchedule(6, 10, 2), InfoBatchPolicy(0.5, 1.0))
    pruner.begin_pass()
    pruner.record(torch.arange(6), torch.ones(6), torch.arange(6) > 2)
    pruner.advance(6)
    pruner.finish_pass()
    assert not pruner.begin_pass().pruned and pruner.blank_factor(2) == 1.0


def test_which_samples_gave_no_score_is_remembered_and_resumed():
    pruner = Pruner(EpochSchedule(8, 10, 2), InfoBatchPolicy())
    pruner.begin_pass()
    losses = torch.ones(8)
    losses[3] = float("nan")
    pruner.record(torch.arange(8), losses, torch.arange(8) > 1)
    pruner.record(torch.tensor([1]), torch.ones(1))  # which has one now
    pruner.store.flush()
    assert (pruner.store.num_invalid, pruner.store.num_nonfinite, pruner.unscored) == (2, 1, 2)
    assert pruner.store.unusable.blank.nonzero().flatten().tolist() == [0, 1]
    again = Pruner(EpochSchedule(8, 10, 2), InfoBatchPolicy())
    state = pruner.state_dict()
    again.load_state_dict(state)
    assert (again.store.num_invalid, again.store.num_nonfinite, again.unscored) == (2, 1, 2)
    for damaged in (torch.zeros(7, dtype=torch.uint8), torch.zeros(8), torch.full((8,), 9, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="damaged at 'unusable'"):
            again.load_state_dict({**state, "unusable": damaged})
    del state["unusable"]  # as earlier versions wrote it
    again.load_state_dict(state)
    assert (again.store.num_invalid, again.unscored) == (2, 0)
