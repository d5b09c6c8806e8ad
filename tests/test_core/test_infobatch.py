"""InfoBatch in plain PyTorch loops: whole simulated trainings beside the slow twin."""

from __future__ import annotations

import doctest
import io
import json
import logging
import multiprocessing
import pickle
import random
import time
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from reference import ReferenceRun, weighted_mean
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import infobatch_mm.core.infobatch as module
from infobatch_mm import InfoBatch, InfoBatchPolicy, Plan, PruningPolicy

Visits = list[tuple[int, float]]

LOADERS = pytest.mark.parametrize(
    "workers",
    [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}],
    ids=["main", "workers", "persistent"],
)


class Numbers(Dataset):
    """Items that tell their own index."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        assert 0 <= index < self.num_samples
        return torch.tensor([index, 0.5]), index * 10

    def __len__(self) -> int:
        return self.num_samples


def losses_of(index: torch.Tensor, epoch: int) -> torch.Tensor:
    """A loss that depends on the sample and the pass alone, not on the order of the visits."""
    return ((index * 7919 + epoch * 104729 + 13) % 1009).float() / 1009 + 0.01


BUILT: list[DataLoader] = []


@pytest.fixture(autouse=True)
def stop_persistent_workers():
    """No test inherits the worker processes of another."""
    yield
    while BUILT:
        iterator = BUILT.pop()._iterator
        if iterator is not None:
            iterator._shutdown_workers()


def build(
    num_samples: int, per_batch: int = 4, workers: dict[str, Any] | None = None, drop_last: bool = False, **kwargs: Any
) -> tuple[InfoBatch, DataLoader]:
    """An InfoBatch of six passes, all of them open to pruning unless said otherwise, and its loader."""
    infobatch = InfoBatch(num_samples, **{"num_epochs": 6, "delta": 1.0, **kwargs})
    dataset = infobatch.attach(Numbers(num_samples))
    loader = DataLoader(dataset, per_batch, sampler=infobatch.sampler, drop_last=drop_last, **(workers or {}))
    BUILT.append(loader)
    return infobatch, loader


def train(infobatch: InfoBatch, loader: Iterable, epoch: int, batches: int | None = None) -> Visits:
    """One epoch of the loop in the README, or its first batches; answers what was visited and its weight."""
    visits: Visits = []
    for done, (index, (x, y)) in enumerate(loader, 1):
        assert x[:, 0].tolist() == index.tolist() and y.tolist() == (index * 10).tolist()
        losses = losses_of(index, epoch).requires_grad_()
        infobatch.weigh(losses, index).backward()
        visits += zip(index.tolist(), (losses.grad * len(index)).tolist(), strict=True)
        if done == batches:
            break
    return visits


def indices_of(visits: Visits) -> list[int]:
    return [index for index, _ in visits]


def check_against(twin: ReferenceRun, visits: Visits, epoch: int) -> None:
    """Every visit of the pass once, with the twin's weight; then step the twin."""
    expected = twin.weights(indices_of(visits))
    assert dict(visits) == pytest.approx(expected, rel=1e-6)
    twin.finish(indices_of(visits), losses_of(torch.tensor(indices_of(visits)), epoch).tolist())


def passes_done(infobatch: InfoBatch) -> int:
    return infobatch.summary()["passes_done"]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---- whole trainings ------------------------------------------------------------------------------------------


@LOADERS
@pytest.mark.parametrize(("num_samples", "batch_size"), [(30, 4), (5, 2), (7, 16), (24, 4)])
def test_every_visit_of_a_plan_is_made_once_with_the_weight_of_the_twin(
    workers: dict[str, Any], num_samples: int, batch_size: int
):
    infobatch, loader = build(num_samples, batch_size, workers, num_epochs=5, delta=0.8)
    twin = ReferenceRun(num_samples, 5, 0.5, 0.8)
    pruned = 0
    for epoch in range(5):
        assert passes_done(infobatch) == epoch
        pruned += twin.prunes()
        check_against(twin, train(infobatch, loader, epoch), epoch)
    assert passes_done(infobatch) == 5
    assert pruned == 3


@pytest.mark.parametrize(("r", "delta"), [(0.3, 1.0), (0.5, 0.875), (0.7, 0.5), (0.95, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("batch_size", [None, 8])
def test_long_trainings_agree_with_the_twin(r: float, delta: float, batch_size: int | None):
    infobatch, loader = build(50, 8, num_epochs=24, prune_ratio=r, delta=delta, batch_size=batch_size, seed=3)
    twin = ReferenceRun(50, 24, r, delta, batch_size or 1)
    for epoch in range(24):
        check_against(twin, train(infobatch, loader, epoch), epoch)


@LOADERS
def test_batch_size_makes_pruned_passes_consist_of_full_batches(workers: dict[str, Any]):
    infobatch, loader = build(50, 8, workers, batch_size=8)
    twin = ReferenceRun(50, 6, 0.5, 1.0, 8)
    for epoch in range(6):
        prunes = twin.prunes()
        visits = train(infobatch, loader, epoch)
        assert prunes is (epoch > 0)
        assert len(visits) % 8 == (0 if prunes else 2)
        check_against(twin, visits, epoch)


def test_weights_of_a_pass_sum_to_the_number_of_samples():
    infobatch, loader = build(64)
    for epoch in range(6):
        assert sum(weight for _, weight in train(infobatch, loader, epoch)) == pytest.approx(64, rel=1e-5)


def test_same_seed_gives_the_same_training_and_another_seed_another():
    runs = []
    for seed in (0, 0, 1):
        infobatch, loader = build(30, seed=seed)
        runs.append([train(infobatch, loader, epoch) for epoch in range(4)])
    assert runs[0] == runs[1] != runs[2]


@LOADERS
def test_workers_do_not_change_the_training(workers: dict[str, Any]):
    infobatch, loader = build(30)
    other, other_loader = build(30, workers=workers)
    for epoch in range(3):
        assert train(other, other_loader, epoch) == train(infobatch, loader, epoch)


def test_policy_none_visits_everything_in_every_pass():
    infobatch, loader = build(10, policy="none")
    for epoch in range(6):
        assert sorted(train(infobatch, loader, epoch)) == [(i, 1.0) for i in range(10)]
    assert infobatch.summary()["policy"] == "none"


def test_own_policy_is_walked():
    class Half(PruningPolicy):
        name = "half"

        def is_active(self, progress: float) -> bool:
            return True

        def draw(self, scores, seen, generator, multiple_of) -> Plan | None:
            return Plan(torch.arange(0, len(scores), 2), torch.full((len(scores) // 2,), 2.0), pruned=True)

    infobatch, loader = build(8, policy=Half())
    assert train(infobatch, loader, 0) == [(0, 2.0), (2, 2.0), (4, 2.0), (6, 2.0)]


def test_without_shuffle_passes_are_in_order():
    infobatch, loader = build(20, shuffle=False)
    for epoch in range(4):
        visited = indices_of(train(infobatch, loader, epoch))
        assert visited == sorted(visited)


def test_walking_and_weighing_leave_the_global_random_states_alone():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    infobatch = InfoBatch(20, 4)
    for epoch in range(4):
        for index in infobatch.sampler:
            infobatch.weigh(losses_of(torch.tensor([index]), epoch), [index])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_nonfinite_losses_never_become_scores():
    infobatch = InfoBatch(6, 4, delta=1.0)
    for index in infobatch.sampler:
        infobatch.weigh(torch.tensor([float("nan") if index < 2 else float(index)]), [index])
    # Mean of 2..5 is 3.5: candidates 2 and 3, one of them is kept; 0 and 1 are unseen.
    visited = set(infobatch.sampler)
    assert len(visited) == 5 and {0, 1, 4, 5} <= visited
    assert infobatch.summary()["nonfinite_losses"] == 2


def test_docstring_example_runs():
    tests = [t for t in doctest.DocTestFinder().find(InfoBatch, "InfoBatch", module) if t.examples]
    assert tests
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0


# ---- what ends a pass, and what does not -------------------------------------------------------------------------


@LOADERS
@pytest.mark.parametrize(("num_samples", "batch_size"), [(40, 4), (5, 2), (4, 2), (3, 3)])
def test_peek_consumes_nothing(workers: dict[str, Any], num_samples: int, batch_size: int):
    # With two workers and these sizes the prefetch hands out some, all or just all of the indices.
    infobatch, loader = build(num_samples, batch_size, workers)
    unpeeked, unpeeked_loader = build(num_samples, batch_size)
    for epoch in range(3):
        for _ in range(2):
            peeked = next(iter(loader))[0].tolist()
        visits = train(infobatch, loader, epoch)
        assert visits == train(unpeeked, unpeeked_loader, epoch)
        assert peeked == indices_of(visits)[:batch_size]
        assert passes_done(infobatch) == epoch + 1


@LOADERS
def test_weighed_peek_counts_as_the_first_batch(workers: dict[str, Any]):
    infobatch, loader = build(12, 4, workers)
    plan = list(InfoBatch(12, 6).sampler)
    index, _ = next(iter(loader))
    infobatch.weigh(losses_of(index, 0), index)
    assert index.tolist() + indices_of(train(infobatch, loader, 0)) == plan
    assert passes_done(infobatch) == 1


@LOADERS
@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_walk_abandoned_midway_goes_on_with_the_rest(workers: dict[str, Any], done: int):
    # Five batches of which the prefetch hands out the last while the second is weighed.
    infobatch, loader = build(20, 4, workers)
    plan = list(InfoBatch(20, 6).sampler)
    before = train(infobatch, loader, 0, batches=done)
    rest = train(infobatch, loader, 0)
    assert indices_of(before + rest) == plan
    assert passes_done(infobatch) == 1


@LOADERS
def test_peek_midway_consumes_nothing(workers: dict[str, Any]):
    infobatch, loader = build(20, 4, workers)
    plan = list(InfoBatch(20, 6).sampler)
    before = train(infobatch, loader, 0, batches=3)
    peeked = next(iter(loader))[0].tolist()
    assert peeked == plan[12:16]
    assert indices_of(before + train(infobatch, loader, 0)) == plan


def test_listing_the_sampler_twice_walks_two_passes():
    infobatch = InfoBatch(20, 6)
    first, second, third = (list(infobatch.sampler) for _ in range(3))
    assert sorted(first) == sorted(second) == sorted(third) == list(range(20))
    assert len({tuple(first), tuple(second), tuple(third)}) == 3
    iter(infobatch.sampler)
    assert passes_done(infobatch) == 3


def test_listing_the_sampler_twice_walks_two_passes_whatever_else_the_process_runs():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))  # a validation loader's, say
    child.start()
    try:
        infobatch = InfoBatch(20, 6)
        assert list(infobatch.sampler) != list(infobatch.sampler)
        iter(infobatch.sampler)
        assert passes_done(infobatch) == 2
    finally:
        child.terminate()
        child.join()


def test_starting_a_walk_twice_ends_one_pass_only():
    infobatch = InfoBatch(20, 6)
    list(infobatch.sampler)
    for _ in range(3):
        iter(infobatch.sampler)
    assert passes_done(infobatch) == 1


def test_leftover_of_an_old_walk_ends_nothing():
    infobatch = InfoBatch(20, 6)
    old = iter(infobatch.sampler)
    next(old)
    for index in infobatch.sampler:
        infobatch.weigh(torch.tensor([float(index)]), [index])
    list(old)
    list(infobatch.sampler)
    assert passes_done(infobatch) == 1


@LOADERS
@pytest.mark.parametrize("num_samples", [10, 31])
def test_drop_last_loader_advances_when_a_new_walk_starts(workers: dict[str, Any], num_samples: int):
    infobatch, loader = build(num_samples, 4, workers, drop_last=True, prune_ratio=0)
    for epoch in range(5):
        visits = train(infobatch, loader, epoch)
        assert len(set(indices_of(visits))) == len(visits) == num_samples // 4 * 4
        assert passes_done(infobatch) == epoch
    iter(infobatch.sampler)
    assert passes_done(infobatch) == 5


@LOADERS
def test_pruned_drop_last_loader_agrees_with_the_twin(workers: dict[str, Any]):
    infobatch, loader = build(31, 4, workers, drop_last=True)
    twin = ReferenceRun(31, 6, 0.5, 1.0)
    for epoch in range(5):
        left = twin.visits()
        visits = train(infobatch, loader, epoch)
        assert len(set(indices_of(visits))) == len(visits) == left // 4 * 4
        scores = [s for s in twin.scores if s is not None]
        heavy = [weight for _, weight in visits if weight > 1]
        if left < 31:
            n = sum(score < sum(scores) / len(scores) for score in scores)
            assert heavy == pytest.approx([n / (left - (31 - n))] * len(heavy))
        else:
            assert not heavy
        twin.finish(indices_of(visits), losses_of(torch.tensor(indices_of(visits)), epoch).tolist())


@LOADERS
def test_peek_at_a_drop_last_loader_between_epochs_consumes_nothing(workers: dict[str, Any]):
    infobatch, loader = build(30, 4, workers, drop_last=True, prune_ratio=0)
    for epoch in range(4):
        next(iter(loader))
        assert len(train(infobatch, loader, epoch)) == 28
        assert passes_done(infobatch) == epoch


def test_weighing_a_batch_twice_does_not_end_the_pass():
    # "A pass is over when every index of a full walk has been weighed."
    infobatch = InfoBatch(8, 3)
    walk = iter(infobatch.sampler)
    first = [next(walk) for _ in range(4)]
    for _ in range(2):
        infobatch.weigh(torch.ones(4), first)
    assert passes_done(infobatch) == 0
    infobatch.weigh(torch.ones(4), list(walk))
    assert passes_done(infobatch) == 1


def test_set_epoch_is_harmless():
    infobatch, loader = build(30)
    plain, plain_loader = build(30)
    for epoch in range(4):
        infobatch.sampler.set_epoch(epoch)
        before = train(infobatch, loader, epoch, batches=2)
        infobatch.sampler.set_epoch(epoch)
        assert before + train(infobatch, loader, epoch) == train(plain, plain_loader, epoch)


def test_epochs_beyond_the_schedule_are_full_and_save_nothing():
    infobatch, loader = build(10, num_epochs=2)
    for epoch in range(4):
        visits = train(infobatch, loader, epoch)
        assert epoch in (0, 1) or sorted(visits) == [(i, 1.0) for i in range(10)]
    assert 0 <= infobatch.summary()["saved_ratio"] < 1


# ---- len --------------------------------------------------------------------------------------------------------


@LOADERS
def test_len_is_right_before_a_walk_and_constant_until_its_last_weigh(workers: dict[str, Any]):
    infobatch, loader = build(31, 4, workers)
    lengths = set()
    for epoch in range(4):
        visits, batches = len(infobatch.sampler), len(loader)
        lengths.add(visits)
        walked = []
        for index, _ in loader:
            assert (len(infobatch.sampler), len(loader)) == (visits, batches)
            infobatch.weigh(losses_of(index, epoch), index)
            walked.append(len(index))
        assert (sum(walked), len(walked)) == (visits, batches)
        assert passes_done(infobatch) == epoch + 1
    assert len(lengths) > 1


def test_len_neither_ends_nor_starts_anything():
    infobatch, loader = build(31, 4)
    plain, plain_loader = build(31, 4)
    for epoch in range(3):
        len(loader)
        before = train(infobatch, loader, epoch, batches=3)
        assert len(infobatch.sampler) == len(plain.sampler)
        assert before + train(infobatch, loader, epoch) == train(plain, plain_loader, epoch)
        assert passes_done(infobatch) == epoch + 1


def test_len_after_resuming_midway_is_that_of_the_whole_pass():
    infobatch, loader = build(31, 4)
    train(infobatch, loader, 0)
    whole = len(loader)
    train(infobatch, loader, 1, batches=2)
    resumed, resumed_loader = build(31, 4)
    resumed.load_state_dict(through_a_file(infobatch.state_dict()))
    assert len(resumed_loader) == len(loader) == whole


# ---- weigh ------------------------------------------------------------------------------------------------------


def pruned_pass(seed: int = 0) -> tuple[InfoBatch, torch.Tensor, dict[int, float]]:
    """An InfoBatch in its second pass, the indices of that pass, and their weights by the twin."""
    infobatch, twin = InfoBatch(16, 4, seed=seed), ReferenceRun(16, 4, 0.5, 0.875)
    first = torch.tensor(list(infobatch.sampler))
    infobatch.weigh(losses_of(first, 0), first)
    twin.finish(first.tolist(), losses_of(first, 0).tolist())
    indices = torch.tensor(list(infobatch.sampler))
    return infobatch, indices, twin.weights(indices.tolist())


def test_weigh_is_the_mean_of_weighted_losses_and_so_is_its_gradient():
    infobatch, indices, weights = pruned_pass()
    batch = indices[:6]
    gamma = [weights[i] for i in batch.tolist()]
    assert max(gamma) > 1 and min(gamma) == 1
    losses = torch.rand(6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weighted = infobatch.weigh(losses, batch)
    weighted.backward()
    assert weighted.shape == ()
    assert weighted.item() == pytest.approx(weighted_mean(losses.tolist(), gamma), rel=1e-6)
    assert losses.grad.tolist() == pytest.approx([g / 6 for g in gamma], rel=1e-6)


def test_weigh_is_never_divided_by_the_sum_of_the_weights():
    infobatch, indices, weights = pruned_pass()
    heavy = next(i for i in indices.tolist() if weights[i] > 1)
    assert infobatch.weigh(torch.tensor([2.0]), [heavy]).item() == pytest.approx(2 * weights[heavy])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_one_give_the_plain_mean_and_gradient_to_the_bit(dtype: torch.dtype):
    for size in (1, 3, 7, 64):
        infobatch = InfoBatch(size, 3)
        source = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=dtype)
        ours, host = source.clone().requires_grad_(), source.clone().requires_grad_()
        weighted, plain = infobatch.weigh(ours.exp(), list(infobatch.sampler)), host.exp().mean()
        assert weighted.dtype == dtype and torch.equal(weighted, plain)
        weighted.backward()
        plain.backward()
        assert torch.equal(ours.grad, host.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_losses_are_weighed_without_rounding_the_weights(dtype: torch.dtype):
    infobatch = InfoBatch(7, 3)
    losses = torch.rand(7, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    weighted = infobatch.weigh(losses, list(infobatch.sampler))
    # Ours may keep more digits than the host's mean; rounded to the host's they are the same.
    assert torch.equal(weighted.to(dtype), losses.mean())
    weighted.backward()
    assert losses.grad.dtype == dtype
    assert torch.equal(losses.grad, torch.full((7,), 1 / 7).to(dtype))


def test_weigh_leaves_a_leaf_untouched():
    infobatch, indices, _ = pruned_pass()
    leaf = torch.ones(len(indices), requires_grad=True)
    infobatch.weigh(leaf, indices).backward()
    assert torch.equal(leaf.detach(), torch.ones(len(indices)))
    assert leaf.is_leaf


def test_weigh_leaves_what_backward_of_exp_needs_untouched():
    infobatch, indices, weights = pruned_pass()
    leaf = torch.linspace(-1, 1, len(indices)).requires_grad_()
    losses = leaf.exp()
    before = losses.detach().clone()
    infobatch.weigh(losses, indices).backward()  # exp's backward reads its own output
    assert torch.equal(losses.detach(), before)
    expected = [weights[i] * v / len(indices) for i, v in zip(indices.tolist(), before.tolist(), strict=True)]
    assert leaf.grad.tolist() == pytest.approx(expected, rel=1e-6)


def test_scores_are_the_unweighted_losses_even_if_changed_in_place_later():
    infobatch, indices, _ = pruned_pass()
    losses, where = torch.rand(len(indices)), indices.clone()
    expected = losses.clone()
    infobatch.weigh(losses, where)
    losses.mul_(100)
    where.zero_()
    assert torch.equal(infobatch.state_dict()["scores"][indices], expected)


def test_index_array_changed_in_place_later_does_not_change_the_scores():
    infobatch = InfoBatch(4, 2)
    where = np.array(list(infobatch.sampler))
    order = where.copy()
    infobatch.weigh(torch.arange(4.0), where)
    where[:] = 0
    assert infobatch.state_dict()["scores"][torch.from_numpy(order)].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "convert",
    [list, tuple, np.array, torch.tensor, lambda i: torch.tensor(i, dtype=torch.int32)],
    ids=["list", "tuple", "array", "tensor", "int32"],
)
def test_indices_may_be_a_sequence_an_array_or_a_tensor(convert: Any):
    infobatch = InfoBatch(5, 2)
    assert infobatch.weigh(torch.arange(5.0), convert(list(infobatch.sampler))).item() == 2


@pytest.mark.parametrize("shape", [(), (4, 1), (4, 2), (2, 3, 3)])
def test_losses_that_are_not_per_sample_are_refused_with_their_shape(shape: tuple[int, ...]):
    infobatch = InfoBatch(4, 2)
    list(infobatch.sampler)
    with pytest.raises(ValueError) as refused:
        infobatch.weigh(torch.zeros(shape), [0, 1, 2, 3])
    assert str(shape) in str(refused.value) and "reduction='none'" in str(refused.value)


@pytest.mark.parametrize("index", [[0, 1, 2], [0, 1, 2, 3, 0], [[0, 1, 2, 3]], [[0], [1], [2], [3]], 0, []])
def test_indices_that_do_not_fit_the_losses_are_refused(index: Any):
    infobatch = InfoBatch(4, 2)
    list(infobatch.sampler)
    with pytest.raises(ValueError):
        infobatch.weigh(torch.zeros(4), index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool])
def test_indices_that_are_not_integers_are_refused_with_their_dtype(dtype: torch.dtype):
    infobatch = InfoBatch(4, 2)
    list(infobatch.sampler)
    with pytest.raises(ValueError, match=str(dtype)):
        infobatch.weigh(torch.zeros(4), torch.tensor([0, 1, 2, 3]).to(dtype))


@pytest.mark.parametrize("index", [4, 400, -5, -400])
def test_index_out_of_range_is_refused(index: int):
    infobatch = InfoBatch(4, 2)
    list(infobatch.sampler)
    with pytest.raises(ValueError, match="outside"):
        infobatch.weigh(torch.zeros(2), [0, index])


@pytest.mark.parametrize("index", [-1, -4])
def test_negative_index_is_refused_where_nothing_is_padded(index: int):
    # Padding exists between processes only; here -1 is the user's mistake and must not weigh 0 in silence.
    infobatch = InfoBatch(4, 2)
    list(infobatch.sampler)
    with pytest.raises(ValueError, match=str(index)):
        infobatch.weigh(torch.ones(2), [0, index])


def test_index_of_another_pass_is_refused():
    infobatch, indices, _ = pruned_pass()
    skipped = min(set(range(16)) - set(indices.tolist()))
    with pytest.raises(ValueError, match=f"index {skipped} is not part of pass 1"):
        infobatch.weigh(torch.zeros(2), [int(indices[0]), skipped])


def test_weighing_before_or_after_a_pass_is_refused():
    infobatch = InfoBatch(4, 2)
    with pytest.raises(ValueError, match="no pass"):
        infobatch.weigh(torch.zeros(1), [0])
    infobatch.weigh(torch.zeros(4), list(infobatch.sampler))
    with pytest.raises(ValueError, match="no pass"):
        infobatch.weigh(torch.zeros(1), [0])


def test_refused_batch_changes_nothing():
    infobatch = InfoBatch(4, 2)
    list(infobatch.sampler)
    before = infobatch.state_dict()
    for losses, index in ((torch.zeros(2, 2), [0, 1]), (torch.zeros(2), [0]), (torch.zeros(2), [0, 9])):
        with pytest.raises(ValueError):
            infobatch.weigh(losses, index)
    after = infobatch.state_dict()
    assert (after["visited"], after["num_invalid"]) == (before["visited"], before["num_invalid"])
    assert not after["seen"].any()


# ---- attach and arguments -----------------------------------------------------------------------------------------


def test_attach_yields_index_and_item():
    data = InfoBatch(3, 1).attach(["a", "b", "c"])
    assert len(data) == 3
    assert [data[i] for i in range(3)] == [(0, "a"), (1, "b"), (2, "c")]


def test_attach_refuses_another_length_with_both_numbers():
    with pytest.raises(ValueError) as refused:
        InfoBatch(20210, 1).attach(Numbers(2000))
    assert "20210" in str(refused.value) and "2000" in str(refused.value)


def test_attach_refuses_iterable_data_sets():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(4))

    class SizedStream(Stream):
        def __len__(self) -> int:
            return 4

    for stream in (Stream(), SizedStream(), (i for i in range(4))):
        with pytest.raises(ValueError, match=type(stream).__name__):
            InfoBatch(4, 1).attach(stream)


def test_attached_data_set_survives_pickling():
    # As spawned workers need it.
    data = pickle.loads(pickle.dumps(InfoBatch(3, 1).attach(TensorDataset(torch.arange(3)))))
    assert data[2][0] == 2 and data[2][1][0].item() == 2


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (dict(num_samples=0), "0"),
        (dict(num_samples=-2), "-2"),
        (dict(num_epochs=0), "0"),
        (dict(batch_size=0), "0"),
        (dict(batch_size=-4), "-4"),
        (dict(prune_ratio=1.5), "1.5"),
        (dict(prune_ratio=-0.1), "-0.1"),
        (dict(prune_ratio=1.0), "1.0"),
        (dict(prune_ratio=float("nan")), "nan"),
        (dict(prune_ratio=True), "True"),
        (dict(prune_ratio="0.5"), "'0.5'"),
        (dict(delta=0), "0"),
        (dict(delta=1.1), "1.1"),
        (dict(policy="nonesuch"), "'nonesuch'"),
    ],
    ids=str,
)
def test_bad_argument_is_refused_with_its_value(arguments: dict[str, Any], value: str):
    with pytest.raises(ValueError) as refused:
        InfoBatch(**{"num_samples": 10, "num_epochs": 4, **arguments})
    assert value in str(refused.value)


def test_policy_instance_is_taken():
    infobatch = InfoBatch(10, 4, policy=InfoBatchPolicy(0.25, 0.5))
    assert (infobatch.summary()["prune_ratio"], infobatch.summary()["delta"]) == (0.25, 0.5)


# ---- state and books ------------------------------------------------------------------------------------------------


@LOADERS
@pytest.mark.parametrize(("epoch", "batches"), [(0, 3), (1, 1), (2, 4)])
def test_resuming_midway_continues_with_the_very_same_visits_and_weights(
    workers: dict[str, Any], epoch: int, batches: int
):
    straight, loader = build(50, 4, workers, num_epochs=4)
    for done in range(epoch):
        train(straight, loader, done)
    plan_length = len(straight.sampler)
    before = train(straight, loader, epoch, batches)
    state = through_a_file(straight.state_dict())

    resumed, resumed_loader = build(50, 4, workers, num_epochs=4, seed=77)
    resumed.load_state_dict(state)
    rest = train(resumed, resumed_loader, epoch)
    assert len(set(indices_of(before + rest))) == len(before + rest) == plan_length
    # The straight run, walked on without workers: their prefetch must not decide what comes next.
    straight.load_state_dict(state)
    _, main_loader = build(50, 4)
    main_loader = DataLoader(main_loader.dataset, sampler=straight.sampler, batch_size=4)
    assert rest == train(straight, main_loader, epoch)
    for later in range(epoch + 1, 4):
        assert train(resumed, resumed_loader, later) == train(straight, main_loader, later)
    assert resumed.summary() == straight.summary()


def test_resuming_between_passes_equals_the_straight_run():
    straight, loader = build(30)
    train(straight, loader, 0)
    resumed, resumed_loader = build(30, seed=5)
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    for epoch in range(1, 4):
        assert train(resumed, resumed_loader, epoch) == train(straight, loader, epoch)


def test_resuming_after_a_drop_last_epoch_equals_the_straight_run():
    straight, loader = build(31, drop_last=True)
    train(straight, loader, 0)
    resumed, resumed_loader = build(31, drop_last=True)
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    for epoch in range(1, 4):
        assert train(resumed, resumed_loader, epoch) == train(straight, loader, epoch)


def test_rolling_back_midway_forgets_a_walk_that_came_after_the_state():
    infobatch, loader = build(31, drop_last=True)
    train(infobatch, loader, 0, batches=2)
    state = through_a_file(infobatch.state_dict())
    rest = train(infobatch, loader, 0)
    infobatch.load_state_dict(state)
    assert train(infobatch, loader, 0) == rest


def test_state_of_another_run_is_refused_with_both_values():
    with pytest.raises(ValueError, match=r"20210.*2000"):
        InfoBatch(2000, 4).load_state_dict(InfoBatch(20210, 4).state_dict())
    with pytest.raises(ValueError, match=r"0\.25.*0\.5"):
        InfoBatch(10, 4, prune_ratio=0.5).load_state_dict(InfoBatch(10, 4, prune_ratio=0.25).state_dict())


def test_state_with_unmerged_scores_says_so_on_resume(caplog: pytest.LogCaptureFixture):
    state = {**InfoBatch(10, 4).state_dict(), "unmerged": True}
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        InfoBatch(10, 4).load_state_dict(state)
    assert caught or caplog.records


def test_summary_has_the_keys_of_the_contract_and_adds_up():
    infobatch, loader = build(30, num_epochs=3)
    kept = [len(train(infobatch, loader, epoch)) for epoch in range(3)]
    summary = infobatch.summary()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert (summary["policy"], summary["prune_ratio"], summary["delta"]) == ("infobatch", 0.5, 1.0)
    assert (summary["num_samples"], summary["seed"]) == (30, 0)
    assert (summary["passes_done"], summary["passes_total"]) == (3, 3)
    assert (summary["samples_seen"], summary["samples_full"]) == (sum(kept), 90)
    assert summary["saved_ratio"] == pytest.approx(1 - sum(kept) / 90)
    assert [entry["kept"] for entry in summary["per_pass"]] == kept
    assert all(set(entry) == {"pass", "kept", "kept_ratio", "threshold", "score_mean"} for entry in summary["per_pass"])


def test_summary_is_not_the_book_itself():
    infobatch, loader = build(10)
    train(infobatch, loader, 0)
    infobatch.summary()["per_pass"].clear()
    assert infobatch.summary()["per_pass"][0]["kept"] == 10


def test_resumed_on_more_processes_a_pass_is_finished(monkeypatch: pytest.MonkeyPatch):
    # What was left was one global batch: not a tail that a loader dropped.
    alone = InfoBatch(64, 3, batch_size=8)
    walk = iter(alone.sampler)
    for _ in range(7):
        index = [next(walk) for _ in range(8)]
        alone.weigh(torch.ones(8), index)
    monkeypatch.setattr("infobatch_mm.core.infobatch.world_size", lambda: 2)
    first = InfoBatch(64, 3, batch_size=8)
    first.load_state_dict(alone.state_dict())
    assert len(list(first.sampler)) == 4
    assert first.summary()["passes_done"] == 0


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("save_after", range(1, 6))
def test_with_drop_last_epochs_saved_at_their_end_are_neither_repeated_nor_lost(save_after: int, workers: int):
    def epochs(infobatch: InfoBatch, until: int) -> list[int]:
        loader = DataLoader(
            infobatch.attach(list(range(37))), 4, sampler=infobatch.sampler, drop_last=True, num_workers=workers
        )
        steps = []
        for _ in range(infobatch.summary()["passes_done"], until):
            batches = [infobatch.weigh(1.0 + index.float(), index) for index, _ in loader]
            steps.append(len(batches))
        return steps

    straight = epochs(InfoBatch(37, 6, batch_size=4), 6)
    first, second = InfoBatch(37, 6, batch_size=4), InfoBatch(37, 6, batch_size=4)
    begun = epochs(first, save_after)
    second.load_state_dict(first.state_dict())
    assert second.summary()["passes_done"] == save_after
    assert begun + epochs(second, 6) == straight


def test_a_tail_that_is_not_dropped_is_visited_after_a_resume():
    infobatch = InfoBatch(10, 2, batch_size=4)
    data = list(range(10))
    loader = iter(DataLoader(infobatch.attach(data), 4, sampler=infobatch.sampler))
    for index, _ in (next(loader), next(loader)):
        infobatch.weigh(torch.ones(4), index)
    resumed = InfoBatch(10, 2, batch_size=4)
    resumed.load_state_dict(infobatch.state_dict())
    rest = next(iter(DataLoader(resumed.attach(data), 4, sampler=resumed.sampler)))[0]
    assert len(rest) == 2 and resumed.summary()["passes_done"] == 0


def test_batches_of_several_processes_that_are_too_large_are_warned_of_once(monkeypatch: pytest.MonkeyPatch):
    infobatch = InfoBatch(16, 2, batch_size=4)
    infobatch._sampler.world = 2
    monkeypatch.setattr("infobatch_mm.core.infobatch.world_size", lambda: 2)
    index = list(infobatch.sampler)
    with pytest.warns(UserWarning, match=r"4 samples on each of 2 processes are 8 at once, but batch_size=4"):
        infobatch.weigh(torch.ones(4), index[:4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infobatch.weigh(torch.ones(4), index[4:])
