"""InfoBatch in plain PyTorch loops: whole simulated trainings beside the slow twin."""

from __future__ import annotations

import doctest
import io
import json
import logging
import pickle
import random
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from reference import ReferenceRun, weighted_mean
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

import infobatch_mm.loop.infobatch as module
from infobatch_mm import InfoBatch, InfoBatchPolicy, Plan, PruningPolicy
from infobatch_mm.loop import PassLoader

Visits = list[tuple[int, float]]

WORKERS: list[dict[str, Any]] = [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}]
KINDS = dict(zip(("main", "workers", "persistent"), WORKERS, strict=True))


def loaders(*by_default: str, users: bool = True, ours: bool = True) -> pytest.MarkDecorator:
    """A DataLoader of the user's over attach() and sampler, or infobatch.loader(), without and with workers.

    Where nothing depends on what workers have read ahead, those with workers run in the long suite only. Workers that
    end with their walk read ahead as persistent ones do, which the next walk finds in their midst.
    """
    params = []
    for is_ours in [False] * users + [True] * ours:
        for name, options in KINDS.items():
            marks = [] if name in by_default else pytest.mark.slow
            each = {"ours": True, **options} if is_ours else options
            params.append(pytest.param(each, id="ours-" * is_ours + name, marks=marks))
    return pytest.mark.parametrize("workers", params)


LOADERS = loaders("main", "persistent")
USERS_LOADERS = loaders("main", "persistent", ours=False)
OUR_LOADERS = loaders("main", "persistent", users=False)
MAIN_LOADERS = loaders("main")


def loaders_and_sizes(*sizes: tuple[int, int], with_workers: int) -> pytest.MarkDecorator:
    """Data sets and batches of several sizes without workers, and the first few of them with workers."""
    params = []
    for kind in LOADERS.args[1]:
        for place, size in enumerate(sizes):
            marks = pytest.mark.slow if place >= with_workers and "main" not in kind.id else kind.marks
            params.append(pytest.param(*kind.values, *size, id=f"{kind.id}-{size[0]}-{size[1]}", marks=marks))
    return pytest.mark.parametrize(("workers", "num_samples", "batch_size"), params)


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


BUILT: list[DataLoader | PassLoader] = []


@pytest.fixture(autouse=True)
def stop_persistent_workers():
    """No test inherits the worker processes of another."""
    yield
    while BUILT:
        loader = BUILT.pop()
        iterator = (loader._loader if isinstance(loader, PassLoader) else loader)._iterator
        if iterator is not None:
            iterator._shutdown_workers()


def build(
    num_samples: int, per_batch: int = 4, workers: dict[str, Any] | None = None, drop_last: bool = False, **kwargs: Any
) -> tuple[InfoBatch, Any]:
    """An InfoBatch of six passes, all of them open to pruning unless said otherwise, and its loader."""
    infobatch = InfoBatch(num_samples, **{"num_epochs": 6, "delta": 1.0, **kwargs})
    options = {"drop_last": drop_last, **(workers or {})}
    loader: Any
    if options.pop("ours", False):
        loader = infobatch.loader(Numbers(num_samples), per_batch, **options)
    else:
        loader = DataLoader(infobatch.attach(Numbers(num_samples)), per_batch, sampler=infobatch.sampler, **options)
    BUILT.append(loader)
    return infobatch, loader


def divides_by(workers: dict[str, Any], per_batch: int) -> int:
    """What the kept counts are a multiple of, where InfoBatch is given no batch size."""
    return per_batch if "ours" in workers else 1


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


@loaders_and_sizes((30, 4), (5, 2), (7, 16), (24, 4), with_workers=1)
def test_every_visit_of_a_plan_is_made_once_with_the_weight_of_the_twin(
    workers: dict[str, Any], num_samples: int, batch_size: int
):
    if "ours" in workers and batch_size > num_samples:
        pytest.skip("our loader refuses a batch that holds more than the data set")
    infobatch, loader = build(num_samples, batch_size, workers, num_epochs=5, delta=0.8)
    twin = ReferenceRun(num_samples, 5, 0.5, 0.8, divides_by(workers, batch_size))
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


@MAIN_LOADERS
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
    infobatch, loader = build(30, batch_size=4)
    other, other_loader = build(30, workers=workers, batch_size=4)
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


def plans(num_samples: int, batch_size: int = 4, passes: int = 2, **kwargs: Any) -> list[list[int]]:
    """What a training visits that weighs every batch."""
    infobatch, loader = build(num_samples, batch_size, batch_size=batch_size, **kwargs)
    return [indices_of(train(infobatch, loader, epoch)) for epoch in range(passes)]


@loaders_and_sizes((40, 4), (4, 2), (5, 2), (3, 3), with_workers=2)
def test_peek_consumes_nothing(workers: dict[str, Any], num_samples: int, batch_size: int):
    # With two workers and these sizes the prefetch hands out some, all or just all of the indices.
    infobatch, loader = build(num_samples, batch_size, workers, batch_size=batch_size)
    unpeeked, unpeeked_loader = build(num_samples, batch_size, batch_size=batch_size)
    for epoch in range(3):
        for _ in range(2):
            peeked = next(iter(loader))[0].tolist()
        visits = train(infobatch, loader, epoch)
        assert visits == train(unpeeked, unpeeked_loader, epoch)
        assert peeked == indices_of(visits)[:batch_size]
        assert passes_done(infobatch) == epoch + 1


@LOADERS
def test_a_walk_of_which_nothing_is_weighed_counts_for_nothing(workers: dict[str, Any]):
    # As a train accuracy is measured, before, between and after the passes.
    infobatch, loader = build(40, 4, workers, num_epochs=3, batch_size=4)
    expected = plans(40, passes=3, num_epochs=3)
    for epoch in range(3):
        looked_at = [index for batch, _ in loader for index in batch.tolist()]
        assert looked_at == expected[epoch]
        assert passes_done(infobatch) == epoch
        assert indices_of(train(infobatch, loader, epoch)) == expected[epoch]
    for _ in loader:
        pass
    summary = infobatch.summary()
    assert (summary["passes_done"], summary["visits_skipped"]) == (3, 0)
    assert summary["visits"] == sum(map(len, expected))


@LOADERS
@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_a_walk_that_is_broken_off_is_followed_by_a_new_pass(workers: dict[str, Any], done: int):
    # Five batches of which the prefetch hands out the last while the second is weighed.
    infobatch, loader = build(20, 4, workers, batch_size=4)
    before = train(infobatch, loader, 0, batches=done)
    assert indices_of(before) == plans(20)[0][: 4 * done]
    after = train(infobatch, loader, 1)
    twin = ReferenceRun(20, 6, 0.5, 1.0, 4)
    twin.finish(indices_of(before), losses_of(torch.tensor(indices_of(before)), 0).tolist())
    check_against(twin, after, 1)
    summary = infobatch.summary()
    assert [entry["kept"] for entry in summary["per_pass"]] == [4 * done, len(after)]
    assert (summary["passes_done"], summary["visits_skipped"]) == (2, 0)


@LOADERS
@pytest.mark.parametrize("skipped", [(0,), (2,), (0, 3), (1, 2, 3)])
def test_skipped_batches_are_booked_and_the_next_pass_is_a_new_one(workers: dict[str, Any], skipped: tuple[int, ...]):
    infobatch, loader = build(64, 8, {**workers, **({"in_order": True} if workers.get("num_workers") else {})})
    seen: list[set[int]] = []
    for epoch in range(4):
        visits: list[int] = []
        for i, (index, _) in enumerate(loader):
            if i in skipped:
                continue  # as after a loss that is NaN
            infobatch.weigh(losses_of(index, epoch), index)
            visits += index.tolist()
        seen.append(set(visits))
        assert passes_done(infobatch) == epoch + 1
        entry = infobatch.summary()["per_pass"][epoch]
        assert (entry["kept"], entry["skipped"]) == (len(visits), 8 * len(skipped))
    assert len(set(map(frozenset, seen))) == 4
    assert len(set.union(*seen)) > 56 - 8 * (len(skipped) - 1)


@OUR_LOADERS
def test_a_skipped_last_batch_is_booked(workers: dict[str, Any]):
    infobatch, loader = build(64, 8, workers)
    for epoch in range(3):
        for i, (index, _) in enumerate(loader):
            if i < len(loader) - 1:
                infobatch.weigh(losses_of(index, epoch), index)
        assert infobatch.summary()["per_pass"][epoch]["skipped"] == 8


@OUR_LOADERS
def test_a_look_at_the_next_batch_in_the_midst_of_a_walk_changes_nothing(workers: dict[str, Any]):
    infobatch, loader = build(40, 4, workers)
    expected = plans(40)
    for epoch in range(2):
        visited: list[int] = []
        for index, _ in loader:
            infobatch.weigh(losses_of(index, epoch), index)
            visited += index.tolist()
            looked_at, (x, _) = next(iter(loader))
            assert x[:, 0].tolist() == looked_at.tolist()
            rest = expected[epoch][len(visited) :]
            assert epoch == 1 or not rest or looked_at.tolist() == rest[:4]  # after the last, the next pass begins
        assert visited == expected[epoch]
        assert passes_done(infobatch) == epoch + 1


@OUR_LOADERS
def test_a_second_walk_takes_the_pass_over_and_the_first_is_told(workers: dict[str, Any]):
    infobatch, loader = build(40, 4, workers)
    expected = plans(40)[0]
    first = iter(loader)
    visited: list[int] = []
    for _ in range(3):
        index, _ = next(first)
        infobatch.weigh(losses_of(index, 0), index)
        visited += index.tolist()
    # As in a notebook where an interrupted cell keeps the iterator alive.
    assert indices_of(train(infobatch, loader, 0)) == expected[12:]
    assert (passes_done(infobatch), infobatch.summary()["per_pass"][0]["kept"]) == (1, 40)
    with pytest.raises(ValueError, match="pass 1 is walked by two iterators at once"):
        next(first)


@USERS_LOADERS
def test_an_iterator_goes_on_no_more_once_another_has_begun_a_pass(workers: dict[str, Any]):
    infobatch, _ = build(20, 4, workers)
    old = iter(infobatch.sampler)
    infobatch.weigh(torch.ones(1), [next(old)])
    list(infobatch.sampler)
    with pytest.raises(ValueError, match="pass 1 is walked by two iterators at once"):
        next(old)


@pytest.mark.parametrize("ours", [False, True])
def test_a_broken_walk_of_workers_in_any_order_is_followed_by_a_new_pass(ours: bool):
    options = dict(num_workers=2, in_order=False, **({"ours": True} if ours else {}))
    infobatch, loader = build(64, 8, options)
    seen: set[int] = set()
    for epoch in range(6):
        seen |= set(indices_of(train(infobatch, loader, epoch, batches=2)))
        assert infobatch.summary()["visits"] == 16 * (epoch + 1)
    assert len(seen) > 40


@MAIN_LOADERS
def test_micro_batches_are_weighed_one_by_one(workers: dict[str, Any]):
    infobatch, loader = build(64, 8, workers, drop_last=True, batch_size=8)
    twin = ReferenceRun(64, 6, 0.5, 1.0, 8)
    for epoch in range(4):
        visits: Visits = []
        for index, _ in loader:
            for part in index.split(4):
                losses = losses_of(part, epoch).requires_grad_()
                infobatch.weigh(losses, part).backward()
                visits += zip(part.tolist(), (losses.grad * len(part)).tolist(), strict=True)
        assert len(visits) == len(set(indices_of(visits)))
        check_against(twin, visits, epoch)
        assert infobatch.summary()["per_pass"][epoch]["kept"] == len(visits)


@MAIN_LOADERS
def test_two_views_of_a_batch_are_one_visit_scored_by_the_mean_of_their_losses(workers: dict[str, Any]):
    infobatch, loader = build(64, 8, workers, batch_size=8)
    twin = ReferenceRun(64, 6, 0.5, 1.0, 8)
    for epoch in range(4):
        visits: Visits = []
        for index, _ in loader:
            one, other = losses_of(index, epoch), losses_of(index, epoch + 17)
            losses = torch.cat([one, other]).requires_grad_()
            weighted = infobatch.weigh(losses, index.repeat(2))
            weighted.backward()
            weights = losses.grad * len(losses)
            assert torch.equal(weights[:8], weights[8:])
            visits += zip(index.tolist(), weights[:8].tolist(), strict=True)
        expected = twin.weights(indices_of(visits))
        assert dict(visits) == pytest.approx(expected, rel=1e-6)
        index = torch.tensor(indices_of(visits))
        twin.finish(index.tolist(), ((losses_of(index, epoch) + losses_of(index, epoch + 17)) / 2).tolist())
        assert infobatch.summary()["per_pass"][epoch]["kept"] == len(visits)
    assert infobatch.state_dict()["times_seen"].max() == 4


@MAIN_LOADERS
def test_a_second_loss_of_a_batch_is_weighed_and_no_second_visit(workers: dict[str, Any]):
    # As of optimisers that evaluate twice.
    infobatch, loader = build(24, 4, workers, batch_size=4)
    plain, plain_loader = build(24, 4, workers, batch_size=4)
    for epoch in range(4):
        for index, _ in loader:
            first = infobatch.weigh(losses_of(index, epoch), index)
            assert infobatch.weigh(2 * losses_of(index, epoch), index).item() == pytest.approx(2 * first.item())
        train(plain, plain_loader, epoch)
    assert infobatch.summary() == plain.summary()
    assert torch.equal(infobatch.state_dict()["scores"], plain.state_dict()["scores"])


@OUR_LOADERS
@pytest.mark.parametrize("across", [False, True])
def test_loops_that_fetch_a_batch_ahead_lose_no_visit(workers: dict[str, Any], across: bool):
    """Within a pass, and across their ends: the last batch is weighed after the next one was fetched."""
    infobatch, loader = build(64, 8, workers)
    in_hand = None
    made = [0] * 4
    for epoch in range(4):
        for index, _ in loader:
            if in_hand is not None:
                infobatch.weigh(losses_of(in_hand[0], epoch), in_hand[0])
                made[in_hand[1]] += len(in_hand[0])
            in_hand = (index, epoch)
        if not across:
            infobatch.weigh(losses_of(in_hand[0], epoch), in_hand[0])
            made[epoch] += len(in_hand[0])
            in_hand = None
    if in_hand is not None:
        infobatch.weigh(losses_of(in_hand[0], 4), in_hand[0])
        made[3] += len(in_hand[0])
    summary = infobatch.summary()
    assert [entry["kept"] for entry in summary["per_pass"]] == made
    assert (summary["visits_skipped"], summary["passes_done"]) == (0, 4)
    assert int(infobatch.state_dict()["times_seen"].sum()) == sum(made)


def test_a_batch_of_an_earlier_pass_is_refused():
    infobatch, loader = build(64, 8, {"ours": True}, prune_ratio=0.7)
    train(infobatch, loader, 0)
    old = [index for index, _ in loader][-1]
    train(infobatch, loader, 1)
    next(iter(loader))
    with pytest.raises(ValueError, match=r"was not handed out so far in pass 3|is not part of pass 3"):
        infobatch.weigh(torch.ones(8), old)


@pytest.mark.parametrize(
    "workers", [{}, pytest.param(KINDS["workers"], marks=pytest.mark.slow), KINDS["persistent"]], ids=list(KINDS)
)
def test_a_collate_function_that_drops_broken_items_loses_no_pass(workers: dict[str, Any]):
    """Of attach(), with pairs; of our loader, with bare items."""

    for ours in (False, True):
        infobatch = InfoBatch(64, 6, delta=1.0, batch_size=8)
        if ours:
            loader: Any = infobatch.loader(Numbers(64), 8, collate_fn=without_broken, **workers)
        else:
            data = infobatch.attach(Numbers(64))
            loader = DataLoader(data, 8, sampler=infobatch.sampler, collate_fn=pairs_without_broken, **workers)
        BUILT.append(loader)
        for epoch in range(5):
            visits = train(infobatch, loader, epoch)
            assert not {5, 17} & set(indices_of(visits))
            entry = infobatch.summary()["per_pass"][epoch] if ours else None
            if entry is not None:
                assert (entry["kept"], entry["skipped"]) == (len(visits), 2)
            assert len(visits) > 30
        # The broken ones have no score and are never pruned.
        assert infobatch.state_dict()["seen"].sum() == 62


def without_broken(items: list) -> Any:
    return default_collate([item for item in items if int(item[0][0]) not in (5, 17)])


def pairs_without_broken(pairs: list) -> Any:
    return default_collate([pair for pair in pairs if pair[0] not in (5, 17)])


@LOADERS
@pytest.mark.parametrize("num_samples", [10, 31])
def test_drop_last_leaves_out_a_tail(workers: dict[str, Any], num_samples: int):
    infobatch, loader = build(num_samples, 4, workers, drop_last=True, prune_ratio=0)
    for epoch in range(5):
        visits = train(infobatch, loader, epoch)
        assert len(set(indices_of(visits))) == len(visits) == num_samples // 4 * 4
        # A DataLoader of the user's does not say that it drops a tail.
        assert passes_done(infobatch) == epoch + ("ours" in workers)
    next(iter(loader))
    assert passes_done(infobatch) == 5
    assert infobatch.summary()["visits_skipped"] == 0


@USERS_LOADERS
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
        assert passes_done(infobatch) == epoch + ("ours" in workers)


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


@MAIN_LOADERS
def test_set_epoch_is_harmless(workers: dict[str, Any]):
    infobatch, loader = build(30, workers=workers, batch_size=4)
    plain, plain_loader = build(30, batch_size=4)
    for epoch in range(4):
        (loader if "ours" in workers else infobatch.sampler).set_epoch(epoch)
        assert train(infobatch, loader, epoch) == train(plain, plain_loader, epoch)


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


@MAIN_LOADERS
def test_len_neither_ends_nor_starts_anything(workers: dict[str, Any]):
    infobatch, loader = build(31, 4, workers, batch_size=4)
    plain, plain_loader = build(31, 4, batch_size=4)
    for epoch in range(3):
        len(loader)
        visits: Visits = []
        for index, _ in loader:
            len(loader), len(infobatch.sampler)
            losses = losses_of(index, epoch).requires_grad_()
            infobatch.weigh(losses, index).backward()
            visits += zip(index.tolist(), (losses.grad * len(index)).tolist(), strict=True)
        assert visits == train(plain, plain_loader, epoch)
        assert passes_done(infobatch) == epoch + 1


@OUR_LOADERS
def test_len_after_resuming_midway_is_of_the_rest_and_of_the_whole_from_then_on(workers: dict[str, Any]):
    infobatch, loader = build(31, 4, workers)
    assert len(loader) == 8
    train(infobatch, loader, 0)
    whole = len(loader)
    train(infobatch, loader, 1, batches=2)
    resumed, resumed_loader = build(31, 4, workers)
    resumed.load_state_dict(through_a_file(infobatch.state_dict()))
    assert len(resumed_loader) == whole - 2
    walked = 0
    for index, _ in resumed_loader:
        walked += 1
        assert len(resumed_loader) == whole - 2
        resumed.weigh(losses_of(index, 1), index)
    assert walked == whole - 2
    coming = len(resumed_loader)
    assert len(list(resumed_loader)) == coming


def test_len_of_a_users_loader_after_resuming_midway_is_that_of_the_whole_pass():
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
    with pytest.raises(ValueError, match=f"index {skipped} is not part of pass 2"):
        infobatch.weigh(torch.zeros(2), [int(indices[0]), skipped])


def test_weighing_before_or_after_a_pass_is_refused():
    infobatch = InfoBatch(4, 2)
    with pytest.raises(ValueError, match="no pass"):
        infobatch.weigh(torch.zeros(1), [0])
    infobatch.weigh(torch.zeros(4), list(infobatch.sampler))
    infobatch.load_state_dict(infobatch.state_dict())
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

    resumed, resumed_loader = build(50, 4, workers, num_epochs=4)
    resumed.load_state_dict(state)
    rest = train(resumed, resumed_loader, epoch)
    assert len(set(indices_of(before + rest))) == len(before + rest) == plan_length
    # The straight run, walked on without workers: their prefetch must not decide what comes next.
    straight.load_state_dict(state)
    if "ours" in workers:
        main_loader: Any = straight.loader(Numbers(50), 4)
    else:
        main_loader = DataLoader(straight.attach(Numbers(50)), sampler=straight.sampler, batch_size=4)
    assert rest == train(straight, main_loader, epoch)
    for later in range(epoch + 1, 4):
        assert train(resumed, resumed_loader, later) == train(straight, main_loader, later)
    assert resumed.summary() == straight.summary()


def test_resuming_between_passes_equals_the_straight_run():
    straight, loader = build(30)
    train(straight, loader, 0)
    resumed, resumed_loader = build(30)
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    for epoch in range(1, 4):
        assert train(resumed, resumed_loader, epoch) == train(straight, loader, epoch)


@LOADERS
def test_resuming_after_a_drop_last_epoch_equals_the_straight_run(workers: dict[str, Any]):
    straight, loader = build(31, workers=workers, drop_last=True)
    train(straight, loader, 0)
    resumed, resumed_loader = build(31, workers=workers, drop_last=True)
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    assert passes_done(resumed) == ("ours" in workers)
    if "ours" not in workers:
        # Nothing but the tail is left of the pass, which this DataLoader drops: an empty walk ends it.
        assert not train(resumed, resumed_loader, 0)
    for epoch in range(1, 4):
        assert train(resumed, resumed_loader, epoch) == train(straight, loader, epoch)


@LOADERS
def test_rolling_back_midway_forgets_a_walk_that_came_after_the_state(workers: dict[str, Any]):
    infobatch, loader = build(31, 4, workers, drop_last=True)
    plan = indices_of(train(*build(31, 4, workers, drop_last=True), 0))
    train(infobatch, loader, 0, batches=2)
    state = through_a_file(infobatch.state_dict())
    train(infobatch, loader, 1)
    infobatch.load_state_dict(state)
    assert indices_of(train(infobatch, loader, 0)) == plan[8:]


@OUR_LOADERS
@pytest.mark.parametrize("at", [0, 2, 6])
def test_a_state_between_a_batch_and_its_weighing_hands_the_batch_out_again(workers: dict[str, Any], at: int):
    infobatch, loader = build(31, 4, workers)
    plan = plans(31)[0]
    for i, (index, _) in enumerate(loader):
        if i == at:
            break
        infobatch.weigh(losses_of(index, 0), index)
    resumed, resumed_loader = build(31, 4, workers)
    resumed.load_state_dict(through_a_file(infobatch.state_dict()))
    assert indices_of(train(resumed, resumed_loader, 0)) == plan[4 * at :]


def test_a_state_of_workers_in_any_order_holds_what_is_left():
    infobatch, loader = build(40, 4, {"ours": True, "num_workers": 2, "in_order": False})
    before = indices_of(train(infobatch, loader, 0, batches=4))
    walk = infobatch._passes.walk
    walk._delivered.reverse()  # as if the second worker had been faster
    state = through_a_file(infobatch.state_dict())
    assert state["plan"]["indices"][:16].tolist() != before and set(state["plan"]["indices"][:16].tolist()) == set(
        before
    )
    resumed, resumed_loader = build(40, 4, {"ours": True})
    resumed.load_state_dict(state)
    rest = indices_of(train(resumed, resumed_loader, 0))
    assert sorted(before + rest) == list(range(40))


def test_what_was_skipped_before_a_checkpoint_is_booked_after_it():
    infobatch, loader = build(32, 4, {"ours": True})
    for i, (index, _) in enumerate(loader):
        if i != 1:
            infobatch.weigh(losses_of(index, 0), index)
        if i == 3:
            break
    resumed, resumed_loader = build(32, 4, {"ours": True})
    resumed.load_state_dict(through_a_file(infobatch.state_dict()))
    train(resumed, resumed_loader, 0)
    entry = resumed.summary()["per_pass"][0]
    assert (entry["kept"], entry["skipped"], entry["kept_ratio"]) == (28, 4, 28 / 32)
    assert resumed.summary()["saved_ratio"] == 0


@pytest.mark.parametrize(
    ("name", "there", "here"),
    [("num_epochs", 4, 6), ("seed", 0, 3), ("shuffle", True, False), ("item_seed", False, True)],
)
def test_a_state_of_another_training_is_refused_with_both_values(name: str, there: Any, here: Any):
    state = InfoBatch(10, **{"num_epochs": 4, name: there}).state_dict()
    with pytest.raises(ValueError, match=f"trained with {name}={there}, this run has {name}={here}"):
        InfoBatch(10, **{"num_epochs": 4, name: here}).load_state_dict(state)


def test_a_state_of_another_data_set_is_refused_by_its_fingerprint():
    state = InfoBatch(10, 4, fingerprint="a").state_dict()
    InfoBatch(10, 4, fingerprint="a").load_state_dict(state)
    with pytest.raises(ValueError, match=r"fingerprint 'a', this data set has 'b'"):
        InfoBatch(10, 4, fingerprint="b").load_state_dict(state)


def test_a_loader_made_after_the_state_was_loaded_goes_on_in_its_batches():
    straight, loader = build(50, 4, {"ours": True})
    train(straight, loader, 0)
    before = train(straight, loader, 1, batches=3)
    resumed = InfoBatch(50, 6, delta=1.0)
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    rest = train(resumed, resumed.loader(Numbers(50), 4), 1)
    other, other_loader = build(50, 4, {"ours": True})
    train(other, other_loader, 0)
    assert before + rest == train(other, other_loader, 1)


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
    assert (summary["visits"], summary["visits_full"]) == (sum(kept), 90)
    assert summary["saved_ratio"] == pytest.approx(1 - sum(kept) / 90)
    assert [entry["kept"] for entry in summary["per_pass"]] == kept
    keys = {"pass", "kept", "skipped", "kept_ratio", "threshold", "score_mean", "worth", "cost", "efficiency", "limit"}
    assert all(set(entry) == keys for entry in summary["per_pass"])


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
    for module_name in ("passes", "infobatch", "sizes"):
        monkeypatch.setattr(f"infobatch_mm.loop.{module_name}.world_size", lambda group=None: 2)
    first = InfoBatch(64, 3, batch_size=8)
    first.load_state_dict(alone.state_dict())
    assert len(list(first.sampler)) == 4
    assert first.summary()["passes_done"] == 0


@pytest.mark.parametrize(
    ("workers", "save_after"),
    [
        *((0, save_after) for save_after in range(1, 6)),
        *(pytest.param(1, each, marks=[] if each == 2 else pytest.mark.slow) for each in range(1, 6)),
    ],
)
def test_with_drop_last_epochs_saved_at_their_end_are_neither_repeated_nor_lost(workers: int, save_after: int):
    def epochs(infobatch: InfoBatch, until: int) -> list[int]:
        loader = infobatch.loader(list(range(37)), drop_last=True, num_workers=workers)
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
    infobatch._passes.world = infobatch._passes.sizes.world = 2
    monkeypatch.setattr("infobatch_mm.loop.passes.world_size", lambda group=None: 2)
    index = list(infobatch.sampler)
    with pytest.warns(UserWarning, match=r"4 samples on each of 2 processes are 8 at once, but batch_size=4"):
        infobatch.weigh(torch.ones(4), index[:4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infobatch.weigh(torch.ones(4), index[4:])


# ---- numbers as users give them -----------------------------------------------------------------------------------


NAMES = lambda make: make.__name__  # noqa: E731


@pytest.mark.parametrize(
    ("whole", "real"),
    [(np.int64, np.float32), (np.uint8, np.float64), (torch.tensor, torch.tensor), (np.array, np.float64)],
    ids=NAMES,
)
def test_numbers_of_numpy_and_tensors_without_dimensions_are_numbers(whole: Any, real: Any):
    given = InfoBatch(
        whole(40), whole(6), real(0.5), real(0.875), seed=whole(3), batch_size=whole(4), score_ema=real(0.75)
    )
    plain = InfoBatch(40, 6, 0.5, 0.875, seed=3, batch_size=4, score_ema=0.75)
    assert json.dumps(given.summary()) == json.dumps(plain.summary())
    assert train(given, given.loader(Numbers(40), whole(4)), 0) == train(plain, plain.loader(Numbers(40)), 0)
    given.load_state_dict(through_a_file(plain.state_dict()))


@pytest.mark.parametrize("value", [4.0, "4", True, np.float32(4)])
def test_what_is_no_whole_number_is_refused(value: Any):
    with pytest.raises(ValueError, match=r"num_epochs=.* is not a whole number"):
        InfoBatch(10, value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(shuffle=True), "takes no shuffle"),
        (dict(sampler=[1]), "takes no sampler"),
        (dict(batch_sampler=[[1]]), "takes no batch_sampler"),
        (dict(batch_size=3), "does not divide the global batch_size=4"),
        (dict(batch_size=0), "batch_size=0 is below 1"),
        (dict(batch_size=2.0), "is not a whole number"),
    ],
)
def test_options_of_a_loader_that_do_not_fit_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        InfoBatch(10, 2, batch_size=4).loader(Numbers(10), **options)
    with pytest.raises(ValueError, match="one global batch holds 11 samples but the data set only 10"):
        InfoBatch(10, 2).loader(Numbers(10), 11)
    with pytest.raises(ValueError, match="this InfoBatch was made for 10 samples, the data set has 9"):
        InfoBatch(10, 2).loader(Numbers(9), 3)


def test_a_second_loader_walks_the_same_passes_in_its_own_way():
    infobatch, loader = build(40, 4, {"ours": True})
    clean = infobatch.loader(list("x" * 40), 2)
    for epoch in range(3):
        assert len(list(clean)) == len(clean) and passes_done(infobatch) == epoch
        train(infobatch, loader, epoch)
    with pytest.raises(ValueError, match="does not divide the global batch_size=4"):
        infobatch.loader(Numbers(40), 8)


def test_the_loader_of_our_own_is_no_dataloader_that_a_framework_would_share_out_again():
    accelerate = pytest.importorskip("accelerate")
    infobatch, loader = build(40, 4, {"ours": True})
    assert accelerate.Accelerator(cpu=True).prepare(loader) is loader
    assert len(train(infobatch, loader, 0)) == 40


def test_an_index_on_a_device_is_checked_when_the_pass_ends(monkeypatch: pytest.MonkeyPatch):
    # As if the CPU was a device that is not to be looked at.
    monkeypatch.setattr("infobatch_mm.loop.walk.on_cpu", lambda index: False)
    infobatch, loader = build(16, 4, {"ours": True})
    for index, _ in loader:
        infobatch.weigh(torch.ones(4), index)
    _, left_out = train(infobatch, loader, 1), 99
    walk = iter(loader)
    next(walk)
    infobatch.weigh(torch.ones(1), torch.tensor([left_out]))  # nothing is said in the step
    with pytest.raises(ValueError, match="sample index 99 is outside the data set of 16 samples"):
        infobatch.summary()


# ---- found late -----------------------------------------------------------------------------------------------------


def test_a_resumed_rest_of_which_nothing_is_ever_weighed_does_not_hold_the_training_up():
    first, loader = build(16, 4, {"ours": True})
    for i, (index, _) in enumerate(loader):
        if i < 3:  # and never the last one
            first.weigh(losses_of(index, 0), index)
            state = through_a_file(first.state_dict())
    resumed, loader = build(16, 4, {"ours": True})
    resumed.load_state_dict(state)
    for epoch in range(passes_done(resumed), 6):
        for i, (index, _) in enumerate(loader):
            if len(loader) > 1 and i < 2:
                resumed.weigh(losses_of(index, epoch), index)
    assert passes_done(resumed) == 6
    assert resumed.summary()["per_pass"][0]["skipped"] == 4


@OUR_LOADERS
def test_an_iterator_that_has_given_all_its_batches_is_followed_by_the_next_pass(workers: dict[str, Any]):
    infobatch, loader = build(16, 4, workers, num_epochs=3, prune_ratio=0)
    walks, kept = [], []
    for epoch in range(3):
        iterator = iter(loader)
        kept.append(iterator)
        walks.append([next(iterator)[0] for _ in range(len(loader))])
        for index in walks[-1]:
            infobatch.weigh(losses_of(index, epoch), index)
    assert [sorted(torch.cat(walk).tolist()) for walk in walks] == [list(range(16))] * 3
    assert passes_done(infobatch) == 3
    assert all(next(iterator, None) is None for iterator in kept)


def test_a_take_over_with_workers_in_any_order_visits_what_is_left():
    infobatch, loader = build(48, 4, {"ours": True, "num_workers": 2, "in_order": False})
    iterator = iter(loader)
    visited: list[int] = []
    for _ in range(5):
        index, _ = next(iterator)
        infobatch.weigh(losses_of(index, 0), index)
        visited += index.tolist()
    infobatch._passes.walk._delivered.reverse()  # as if the second worker had been faster
    rest = indices_of(train(infobatch, loader, 0))
    assert sorted(visited + rest) == list(range(48))


def test_a_short_last_batch_is_looked_at_as_it_comes():
    infobatch, loader = build(5, 2, {"ours": True}, shuffle=False)
    iterator = iter(loader)
    for _ in range(2):
        index, _ = next(iterator)
        infobatch.weigh(losses_of(index, 0), index)
    assert next(iter(loader))[0].tolist() == next(iterator)[0].tolist() == [4]


def test_batches_of_a_pass_that_is_over_are_told_of():
    infobatch, loader = build(16, 4, {"ours": True})
    batches = list(loader)
    with pytest.warns(UserWarning, match="batches of pass 1, which is over, are weighed once more"):
        for _ in range(4):
            for index, _ in batches:
                infobatch.weigh(losses_of(index, 0), index)
            infobatch.merge()
            infobatch._passes.end(infobatch._passes.walk)


def test_a_resume_in_a_pass_draws_nothing_from_the_global_generator():
    def first_draw_after(resume: bool) -> float:
        torch.manual_seed(0)
        infobatch, loader = build(16, 4, {"ours": True})
        for i, (index, _) in enumerate(loader):
            infobatch.weigh(losses_of(index, 0), index)
            if i == 1:
                break
        state, generator = infobatch.state_dict(), torch.get_rng_state()
        if resume:
            infobatch, loader = build(16, 4, {"ours": True})
            infobatch.load_state_dict(state)
            torch.set_rng_state(generator)
            next(iter(loader))
        return float(torch.rand(()))

    assert first_draw_after(True) == first_draw_after(False)


def test_a_state_taken_before_the_loader_was_made_says_nothing_of_its_batches():
    infobatch = InfoBatch(32, 4)
    infobatch.load_state_dict(through_a_file(InfoBatch(32, 4).state_dict()))
    loader = infobatch.loader(Numbers(32), 8)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = infobatch.schedule(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16))
    for epoch in range(4):
        for index, _ in loader:
            infobatch.weigh(losses_of(index, epoch), index)
            optimizer.step()
            scheduler.step()
    assert scheduler.last_epoch == 16
