"""The score store: what becomes a score and what does not."""

from __future__ import annotations

import operator
import random

import numpy as np
import pytest
import torch
from reference import update_scores

from infobatch_mm.core import ScoreStore


def record(store: ScoreStore, indices: list[int], losses: list[float], **kwargs: torch.Tensor) -> None:
    store.record(torch.tensor(indices), torch.tensor(losses), **kwargs)


def test_new_store_has_no_scores():
    store = ScoreStore(4)
    assert not store.seen.any()
    assert store.values.tolist() == [0.0] * 4
    assert store.times_seen.tolist() == [0] * 4
    assert (store.values.dtype, store.seen.dtype, store.times_seen.dtype) == (torch.float32, torch.bool, torch.int32)


@pytest.mark.parametrize("num_samples", [0, -3])
def test_empty_store_is_refused_with_the_value(num_samples: int):
    with pytest.raises(ValueError, match=str(num_samples)):
        ScoreStore(num_samples)


def test_visited_samples_get_their_loss_and_others_keep_their_score():
    store = ScoreStore(5)
    record(store, [3, 1], [0.5, 2.0])
    record(store, [1], [0.25])
    store.flush()
    assert store.values.tolist() == [0, 0.25, 0, 0.5, 0]
    assert store.seen.tolist() == [False, True, False, True, False]
    assert store.times_seen.tolist() == [0, 2, 0, 1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_losses_are_counted_and_never_scores(bad: float):
    store = ScoreStore(3)
    record(store, [0, 1], [1.0, 2.0])
    record(store, [0, 2], [bad, bad])
    store.flush()
    assert store.values.tolist() == [1.0, 2.0, 0.0]
    assert store.seen.tolist() == [True, True, False]
    assert store.times_seen.tolist() == [1, 1, 0]
    assert (store.num_nonfinite, store.num_invalid) == (2, 0)


def test_loss_beyond_float32_is_nonfinite():
    store = ScoreStore(2)
    store.record(torch.tensor([0, 1]), torch.tensor([1e300, 1.0], dtype=torch.float64))
    store.flush()
    assert store.seen.tolist() == [False, True]
    assert store.num_nonfinite == 1


def test_invalid_visits_are_counted_and_never_scores():
    store = ScoreStore(4)
    valid = torch.tensor([True, False, False, True])
    record(store, [0, 1, 2, 3], [1.0, 2.0, float("nan"), float("nan")], valid=valid)
    store.flush()
    assert store.seen.tolist() == [True, False, False, False]
    assert store.values.tolist() == [1.0, 0.0, 0.0, 0.0]
    # An invalid loss that is NaN as well counts once, as invalid.
    assert (store.num_invalid, store.num_nonfinite) == (2, 1)


def test_repeated_index_keeps_its_last_loss():
    store = ScoreStore(3)
    record(store, [1, 1, 2, 1], [9.0, 8.0, 5.0, 7.0])
    record(store, [2, 2], [4.0, 3.0])
    store.flush()
    assert store.values.tolist() == [0.0, 7.0, 3.0]
    assert store.times_seen.tolist() == [0, 3, 3]


def test_repeated_index_keeps_its_last_finite_valid_loss():
    store = ScoreStore(1)
    record(store, [0, 0, 0], [1.0, 2.0, float("nan")], valid=torch.tensor([True, False, True]))
    store.flush()
    assert store.values.tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_of_any_float_dtype_become_float32_scores(dtype: torch.dtype):
    store = ScoreStore(3)
    losses = torch.tensor([0.1, 1.7, 3.3], dtype=dtype)
    store.record(torch.tensor([2, 0, 1]), losses)
    store.flush()
    assert store.values.dtype == torch.float32
    assert torch.equal(store.values[[2, 0, 1]], losses.to(torch.float32))


def test_mixed_dtypes_may_be_pending_together():
    store = ScoreStore(3)
    for index, dtype in enumerate((torch.bfloat16, torch.float64, torch.float32)):
        store.record(torch.tensor([index]), torch.tensor([1.5], dtype=dtype))
    store.flush()
    assert store.values.tolist() == [1.5] * 3


def test_record_leaves_its_inputs_alone():
    store = ScoreStore(3)
    indices, valid = torch.tensor([0, 2]), torch.tensor([True, False])
    losses = torch.tensor([1.0, float("nan")], requires_grad=True)
    before = losses.detach().clone()
    store.record(indices, losses, valid)
    store.flush()
    assert indices.tolist() == [0, 2]
    assert valid.tolist() == [True, False]
    assert torch.equal(losses.detach(), before) or torch.equal(losses.detach().isnan(), before.isnan())
    assert losses.requires_grad and losses.grad is None


def test_recorded_scores_carry_no_graph():
    store = ScoreStore(2)
    store.record(torch.tensor([0, 1]), torch.ones(2, requires_grad=True).exp())
    store.flush()
    assert not store.values.requires_grad


@pytest.mark.parametrize("what", ["losses", "indices", "valid"])
def test_later_in_place_changes_of_the_input_do_not_change_the_score(what: str):
    store = ScoreStore(4)
    inputs = {
        "indices": torch.tensor([0, 1]),
        "losses": torch.tensor([0.5, 1.5]),
        "valid": torch.tensor([True, True]),
    }
    store.record(**inputs)
    inputs[what].copy_({"losses": torch.tensor([7.0, 8.0]), "indices": torch.tensor([2, 3])}.get(what, torch.zeros(2)))
    store.flush()
    assert store.seen.tolist() == [True, True, False, False]
    assert store.values.tolist() == [0.5, 1.5, 0.0, 0.0]


def test_lazy_flush_equals_a_dictionary_over_hundreds_of_batches():
    rng = random.Random(0)
    store, twin, times = ScoreStore(50), [None] * 50, [0] * 50
    for _ in range(700):
        indices = [rng.randrange(50) for _ in range(rng.randint(1, 9))]
        losses = torch.rand(len(indices), generator=torch.Generator().manual_seed(rng.randrange(2**31)))
        store.record(torch.tensor(indices), losses)
        twin = update_scores(twin, indices, losses.tolist())
        for index in indices:
            times[index] += 1
    store.flush()
    assert store.values.tolist() == twin
    assert store.times_seen.tolist() == times


def test_flush_and_merge_are_idempotent_in_one_process():
    store = ScoreStore(3)
    record(store, [0, 2], [1.0, float("nan")])
    store.flush()
    store.flush()
    store.merge()
    store.merge()
    assert store.values.tolist() == [1.0, 0.0, 0.0]
    assert store.times_seen.tolist() == [1, 0, 0]
    assert store.num_nonfinite == 1
    assert not store.unmerged


def test_empty_batch_is_harmless():
    store = ScoreStore(2)
    store.record(torch.empty(0, dtype=torch.int64), torch.empty(0))
    store.flush()
    assert not store.seen.any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_small_integer_indices_are_taken(dtype: torch.dtype):
    store = ScoreStore(3)
    store.record(torch.tensor([2, 0], dtype=dtype), torch.tensor([1.0, 2.0]))
    store.record(torch.tensor([1]), torch.tensor([3.0]))
    store.flush()
    assert store.values.tolist() == [2.0, 3.0, 1.0]


def test_large_indices_are_exact():
    num_samples = 2**24 + 10
    store = ScoreStore(num_samples)
    store.record(torch.tensor([2**24 + 1, 2**24 + 3]), torch.tensor([1.0, 2.0]))
    store.flush()
    assert np.flatnonzero(store.seen.numpy()).tolist() == [2**24 + 1, 2**24 + 3]


@pytest.mark.parametrize("score_ema", [0.0, 0.5, 0.9])
def test_score_is_the_average_of_all_visits_in_their_order(score_ema: float):
    rng = random.Random(1)
    store, visits = ScoreStore(20, score_ema), [[] for _ in range(20)]
    for _ in range(600):
        indices = [rng.randrange(20) for _ in range(rng.randint(1, 9))]  # also several times in one batch
        losses = [rng.choice([rng.random(), float("nan")]) for _ in indices]
        record(store, indices, losses)
        for index, loss in zip(indices, losses, strict=True):
            if loss == loss:
                visits[index].insert(0, loss)
    store.flush()
    counts = [[score_ema**k for k in range(len(losses))] for losses in visits]
    twin = [sum(map(operator.mul, *pair)) / sum(pair[1]) for pair in zip(visits, counts, strict=True)]
    assert store.values.tolist() == pytest.approx(twin, rel=1e-5)
    assert store.times_seen.tolist() == [len(losses) for losses in visits]


def test_first_loss_is_a_score_as_it_is_and_the_state_goes_on_with_the_average():
    store, other = ScoreStore(2, 0.75), ScoreStore(2, 0.75)
    record(store, [1], [8.0])
    other.load_state_dict(store.state_dict())
    record(other, [1], [4.0])
    other.flush()
    assert other.values.tolist() == pytest.approx([0.0, (0.75 * 8 + 4) / 1.75])
    assert other.seen.tolist() == [False, True]


@pytest.mark.parametrize("score_ema", [1, -0.1, float("nan"), "0.5", True])
def test_average_outside_its_range_is_refused_with_the_value(score_ema: object):
    with pytest.raises(ValueError, match=rf"score_ema={score_ema!r}.*\[0, 1\)"):
        ScoreStore(3, score_ema)  # type: ignore[arg-type]
