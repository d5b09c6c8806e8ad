"""``AcceleratedInfoBatch`` in one process: accelerate's own training, but for which samples it visits."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    WeightedRandomSampler,
)

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin

from infobatch_mm.core import read_scores
from infobatch_mm.core.summary import SUMMARY_FILE
from infobatch_mm.diffusion import AcceleratedInfoBatch

from .toy import SCHEDULERS, Points, Run, Setup, forget_accelerators, plan_of

PRUNED_PASSES = range(1, 7)  # of 8: the first has no scores, the last is past delta
TAILED = Setup()
ACCUMULATED = Setup(accumulate=4)
NOISY = Setup(samples=30, epochs=6, noise=True, item_seed=True)


pytestmark = pytest.mark.usefixtures("no_accelerator_of_another_test")


def passes(journal: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    return {current: list(steps) for current, steps in groupby(journal, key=lambda entry: entry["pass"])}


def visits(steps: list[dict[str, Any]]) -> list[int]:
    return [index for entry in steps for index in entry["index"]]


def setup_of(loader: DataLoader, **more: Any) -> AcceleratedInfoBatch:
    return AcceleratedInfoBatch(Accelerator(cpu=True), loader, 4, **more)


# ---- weights and scores -----------------------------------------------------------------------------------


def test_a_pass_visits_what_the_paper_says_with_its_weights():
    """Brute force over the journal: who is below the mean of the last losses, how many stay, what they weigh."""
    run = Run(TAILED)
    weighed: dict[int, dict[int, float]] = {}

    def look(step: int) -> None:
        index, batch = run.journal[-1]["index"], run.infobatch._in_hand
        weighed.setdefault(run.journal[-1]["pass"], {}).update(zip(index, batch.weights.tolist(), strict=True))

    by_pass = passes(run.train(look).journal)
    assert sorted(visits(by_pass[0])) == sorted(visits(by_pass[7])) == list(range(46))
    assert set(weighed[0].values()) == set(weighed[7].values()) == {1.0}
    last: dict[int, float] = {}
    for current, steps in by_pass.items():
        if current in PRUNED_PASSES:
            mean = np.mean(list(map(np.float64, last.values())))
            well = {index for index, loss in last.items() if loss < mean}
            seen = visits(steps)
            kept = well & set(seen)
            assert len(seen) == len(set(seen)) and set(seen) == kept | (set(range(46)) - well)
            assert {len(entry["index"]) for entry in steps} == {4}
            assert abs(len(kept) - len(well) / 2) <= 2  # the nearest that makes full batches of 4
            expected = {index: len(well) / len(kept) if index in well else 1.0 for index in seen}
            assert weighed[current] == pytest.approx(expected, rel=1e-6)
        for entry in steps:
            last.update(zip(entry["index"], entry["losses"], strict=True))
    assert run.pruner.store.values.tolist() == pytest.approx([last[i] for i in range(46)], rel=1e-6)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weigh_is_the_mean_of_weight_times_loss_and_so_is_its_gradient(shape: tuple[int, ...], dtype: torch.dtype):
    run = in_a_pruned_pass(TAILED)
    next(iter(run.loader))
    index, weights = run.infobatch._in_hand.index, dict(zip(*(t.tolist() for t in plan_of(run)), strict=True))
    gamma = np.array([weights[i] for i in index.tolist()])
    assert len(set(gamma)) > 1  # a batch of both kinds, or the test says nothing
    values = torch.rand(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    losses = values.clone().requires_grad_()
    weighted = run.infobatch.weigh(losses)
    weighted.backward()
    exact = values.double().numpy().reshape(4, -1)
    assert weighted.dtype == torch.float32 and weighted.shape == ()
    assert weighted.item() == pytest.approx(float((gamma * exact.mean(1)).mean()), rel=1e-6)
    share = (gamma / 4 / exact.shape[1]).reshape(-1, *[1] * (len(shape) - 1)) * np.ones(shape)
    assert losses.grad.double().numpy() == pytest.approx(share, rel=1e-6 if dtype == torch.float32 else 1e-2)
    assert torch.equal(losses.detach(), values)  # left untouched
    assert run.infobatch.loss.item() == pytest.approx(float((gamma * exact.mean(1)).sum() / gamma.sum()), rel=1e-6)
    run.pruner.store.flush()
    assert run.pruner.store.values[index].tolist() == pytest.approx(exact.mean(1).tolist(), rel=1e-6)


def test_scores_given_apart_are_recorded_in_place_of_the_losses():
    run = in_a_pruned_pass(TAILED)
    next(iter(run.loader))
    index, losses = run.infobatch._in_hand.index, torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    expected = (run.infobatch._in_hand.weights * losses).mean()
    weighted = run.infobatch.weigh(losses, scores=torch.tensor([[5.0, 7.0], [1.0, 1.0], [0.0, 1.0], [9.0, 9.0]]))
    assert torch.equal(weighted, expected)
    weights = run.infobatch._in_hand.weights
    assert run.infobatch.loss.item() == pytest.approx(float((weights * torch.arange(1.0, 5.0)).sum() / weights.sum()))
    run.pruner.store.flush()
    assert run.pruner.store.values[index].tolist() == [6.0, 1.0, 0.5, 9.0]


def test_a_second_loss_of_a_batch_weighs_the_same_and_records_nothing():
    run = in_a_pruned_pass(TAILED)
    next(iter(run.loader))
    infobatch, batch = run.infobatch, run.infobatch._in_hand
    infobatch.weigh(torch.full((4,), 3.0))
    before, done = infobatch.summary(), run.pruner.visited
    assert torch.equal(infobatch.weigh(torch.arange(4.0)), (batch.weights * torch.arange(4.0)).mean())
    assert run.pruner.visited == done and infobatch.summary()["iterations"] == before["iterations"]
    run.pruner.store.flush()
    assert run.pruner.store.values[batch.index].tolist() == [3.0] * 4


def test_the_last_batch_of_a_pass_can_be_weighed_twice_too():
    run = in_a_pruned_pass(TAILED)
    for _ in run.loader:
        weights = run.infobatch._in_hand.weights
        run.infobatch.weigh(torch.ones(4))
    assert run.pruner.visited == 0  # the pass is over
    assert torch.equal(run.infobatch.weigh(torch.arange(4.0)), (weights * torch.arange(4.0)).mean())
    assert (run.pruner.pass_index, run.pruner.visited) == (2, 0)


def test_a_loss_that_is_not_a_number_is_no_score_and_stops_nothing():
    run = Run(TAILED)
    real = run.infobatch.weigh
    broken = {7, 30}

    def weigh(losses: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
        bad = torch.tensor([index in broken for index in run.infobatch._in_hand.index.tolist()])
        real(torch.where(bad[:, None], torch.nan, losses))
        return losses.mean()

    run.infobatch.weigh = weigh  # type: ignore[method-assign]
    with pytest.warns(UserWarning) as found:
        by_pass = passes(run.train().journal)
    lines = [str(each.message) for each in found if "not finite" in str(each.message)]
    assert len(lines) == 1 and lines[0].startswith(
        "2 visits of pass 1 had a loss, or a noise level, that is not finite"
    )
    assert all(broken <= set(visits(steps)) for steps in by_pass.values())  # without a score never pruned
    assert run.pruner.store.seen.tolist() == [index not in broken for index in range(46)]
    assert run.infobatch.summary()["nonfinite_losses"] == 2 * 8
    assert len(by_pass[3]) < len(by_pass[0])


def test_bf16_is_weighed_in_full_precision():
    forget_accelerators()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    loader = DataLoader(Points(20), batch_size=4, shuffle=True)
    infobatch = AcceleratedInfoBatch(accelerator, loader, 4)
    model = torch.nn.Linear(4, 1)
    model, optimizer, loader = infobatch.prepare(model, torch.optim.SGD(model.parameters(), 0.1), loader)
    for _ in range(4):
        for batch in loader:
            with accelerator.autocast():
                losses = model.module(batch["x"]) if hasattr(model, "module") else model(batch["x"])
                squares = (losses.to(torch.bfloat16) - batch["y"].to(torch.bfloat16)) ** 2
            assert squares.dtype == torch.bfloat16
            weighted = infobatch.weigh(squares)
            assert weighted.dtype == torch.float32
            accelerator.backward(weighted)
            optimizer.step()
            optimizer.zero_grad()
    assert infobatch.summary()["visits"] < 80 and torch.isfinite(model.weight).all()


# ---- without pruning: accelerate's own --------------------------------------------------------------------


@pytest.mark.parametrize(
    "setup",
    [
        Setup(noise=True),
        Setup(noise=True, shuffle=False, drop_last=True),
        Setup(noise=True, seedable=True, accumulate=4),
        Setup(noise=True, split=True, workers=2, epochs=2),
    ],
    ids=["shuffled", "in order, drop_last", "seedable, accumulated", "split, workers"],
)
def test_policy_none_is_accelerate_to_the_bit_random_numbers_included(setup: Setup):
    alone = Run(Setup(**{**vars(setup), "policy": None})).train()
    drawn = torch.rand(3)
    ours = Run(Setup(**{**vars(setup), "policy": "none"})).train()
    assert torch.equal(torch.rand(3), drawn)
    assert ours.journal == alone.journal
    assert ours.parameters == alone.parameters
    assert bool(ours.pruner.store.seen.all()) == (not setup.drop_last or setup.shuffle)


def test_the_items_and_their_order_in_a_batch_are_the_hosts():
    """In the data set's order a full pass is accelerate's own, batch by batch."""
    ours = Run(Setup(shuffle=False)).train(lambda step: step == 12)
    alone = Run(Setup(shuffle=False, policy=None)).train(lambda step: step == 12)
    assert ours.journal == alone.journal


# ---- batches and indices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dispatch", [False, True])
def test_the_indices_are_those_of_the_batch_in_hand_though_accelerate_reads_ahead(workers: int, dispatch: bool):
    run = Run(Setup(workers=workers, dispatch=dispatch, samples=22, epochs=3))
    looked = 0
    for _ in range(3):
        for batch in run.loader:
            assert torch.equal(batch["index"], run.infobatch._in_hand.index)
            run.infobatch.weigh(batch["index"].float())
            looked += 1
    assert looked < 18
    assert run.pruner.store.values.tolist() == list(range(22))


def test_a_peek_consumes_nothing():
    straight = Run(TAILED).train()
    peeking = Run(TAILED)
    for _ in range(3):
        next(iter(peeking.loader))
    peeking.train(lambda step: peeking.infobatch.passes_done == 3)
    peeking.infobatch.merge()
    next(iter(peeking.loader))
    assert (peeking.pruner.pass_index, peeking.pruner.visited) == (3, 0)
    peeking.train()
    assert peeking.journal == straight.journal


@pytest.mark.parametrize("policy", ["infobatch", "none"])
@pytest.mark.parametrize("stop", [1, 7, 11])
def test_a_walk_that_is_broken_off_is_followed_by_a_new_pass(policy: str, stop: int):
    run = Run(Setup(policy=policy))
    run.train(lambda step: step == stop)
    first = passes(run.journal)[0]
    assert run.infobatch.passes_done == 0
    run.train()
    books = run.infobatch.summary()
    assert (books["per_pass"][0]["kept"], books["visits_skipped"]) == (len(visits(first)), 0)
    assert books["passes_done"] == 9  # the script's loop began again at the pass that was broken off
    assert len(run.journal) == stop + sum(len(steps) for current, steps in passes(run.journal).items() if current)


@pytest.mark.parametrize("policy", ["infobatch", "none"])
def test_batches_that_are_skipped_are_booked_and_the_pass_ends(policy: str):
    run = Run(Setup(policy=policy))
    for epoch in range(3):
        seen = 0
        for i, batch in enumerate(run.loader):
            if i % 4 == 1:
                continue  # as after a loss that is NaN
            run.infobatch.weigh(batch["index"].float())
            seen += len(batch["index"])
        assert run.infobatch.passes_done == epoch + 1
        entry = run.infobatch.summary()["per_pass"][epoch]
        assert entry["kept"] == seen and entry["skipped"] == 4 * 3 - 4 * (epoch > 0 and policy == "infobatch")


def test_skipped_batches_are_told_of():
    run = Run(Setup(samples=8, batch_size=4))
    with pytest.warns(UserWarning, match="4 visits of pass 1 were handed out and not weighed"):
        for i, batch in enumerate(run.loader):
            if i:
                run.infobatch.weigh(batch["index"].float())


@pytest.mark.parametrize("policy", ["infobatch", "none"])
def test_a_walk_of_which_nothing_is_weighed_counts_for_nothing(policy: str):
    straight = Run(Setup(policy=policy, samples=44)).train()
    looking = Run(Setup(policy=policy, samples=44))
    if policy == "infobatch":  # otherwise the host's sampler draws from the generator that all share
        for _ in looking.loader:
            pass
    looking.train(lambda step: looking.infobatch.passes_done == 2)
    looking.infobatch.merge()
    if policy == "infobatch":
        for _ in looking.loader:
            pass
    looking.train()
    assert looking.journal == straight.journal
    assert looking.infobatch.summary()["visits_skipped"] == 0


def test_a_loop_that_fetches_a_batch_ahead_has_its_last_one_weighed_after_the_pass():
    run = Run(Setup(samples=16, batch_size=4))
    ahead = list(run.loader)  # the most that one can fetch
    assert run.infobatch.passes_done == 0
    for epoch in range(3):
        for i, batch in enumerate(run.loader):
            if i < len(run.loader) - 1:
                run.infobatch.weigh(batch["index"].float())
        run.infobatch.weigh(batch["index"].float())
        next(iter(run.loader))
        entry = run.infobatch.summary()["per_pass"][epoch]
        assert entry["skipped"] == 0
    assert len(ahead) == 4


def test_two_iterators_at_once_are_refused():
    run = Run(TAILED)
    first = iter(run.loader)
    run.infobatch.weigh(next(first)["index"].float())
    next(iter(run.loader))
    with pytest.raises(ValueError, match="is walked by two iterators at once"):
        next(first)


def test_the_length_is_an_unpruned_epochs_before_the_first_walk_then_the_passs():
    run = Run(TAILED)
    assert len(run.loader) == 12
    lengths = []
    run.train(lambda step: lengths.append(len(run.loader)))
    by_pass = passes(run.journal)
    for steps in by_pass.values():
        first = steps[0]["step"] - 1
        assert set(lengths[first : first + len(steps)]) == {len(steps)}
    assert len(by_pass[1]) < 12


def test_what_scripts_ask_of_a_loader_is_there():
    run = Run(TAILED)
    assert isinstance(run.loader.dataset, Points) and len(run.loader.dataset) == 46
    assert (run.loader.batch_size, run.loader.num_workers) == (4, 0)
    assert run.scheduler.state_dict() == run.scheduler.scheduler.state_dict()


def test_collate_functions_and_generators_of_the_user_stay():
    forget_accelerators()
    loader = DataLoader(
        Points(8), batch_size=4, shuffle=True, collate_fn=lambda items: [item["index"] for item in items]
    )
    infobatch = setup_of(loader)
    batch = next(iter(infobatch.prepare(loader)))
    assert isinstance(batch, list) and batch == infobatch._in_hand.index.tolist()


# ---- learning rates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_pruned_run_is_at_every_pass_boundary_where_the_unpruned_one_is(kind: str, accumulate: int):
    setup = {"scheduler": kind, "accumulate": accumulate}
    alone = Run(Setup(policy=None, **setup)).train()
    ours = Run(Setup(**setup)).train()
    assert len(ours.journal) < len(alone.journal)
    assert ours.at_pass_end == alone.at_pass_end
    assert (len(set(alone.at_pass_end)) > 1) == (kind != "constant")
    # And evenly on its way: after j of the m updates of a pass where the unpruned one is after j/m of its own.
    begin = Run(Setup(policy=None, **setup)).scheduler.get_last_lr()[0]
    rates = [begin, *(entry["lr"] for entry in alone.journal if entry["updated"])]
    whole = math.ceil(12 / accumulate)
    for current, steps in passes(ours.journal).items():
        updates = [entry["lr"] for entry in steps if entry["updated"]]
        assert updates == [rates[current * whole + whole * j // len(updates)] for j in range(1, len(updates) + 1)]


@pytest.mark.parametrize("too_short", [0, 5])
def test_onecycle_is_never_asked_beyond_its_end(too_short: int):
    """torch raises there, accelerate stops."""
    setup = {"scheduler": "OneCycleLR", "too_short": too_short}
    alone, ours = Run(Setup(policy=None, **setup)).train(), Run(Setup(**setup)).train()
    for _ in range(3):
        ours.scheduler.step()
    assert ours.scheduler.get_last_lr() == alone.scheduler.get_last_lr()
    assert ours.scheduler.scheduler.last_epoch == 8 * 12 - too_short


def test_steps_of_a_skipped_update_are_made_up_for_after_the_next():
    run, skipped = Run(Setup(scheduler="linear")), (25, 26, 33)
    step = run.optimizer.step

    def maybe_skipped() -> None:
        step()
        run.optimizer._is_overflow = len(run.journal) + 1 in skipped

    run.optimizer.step = maybe_skipped
    run.train()
    usual = Run(Setup(scheduler="linear")).train()
    rates, as_usual = ({entry["step"]: entry["lr"] for entry in each.journal} for each in (run, usual))
    assert rates[24] == rates[25] == rates[26] and rates[32] == rates[33]
    assert as_usual[24] > as_usual[25] and as_usual[32] > as_usual[33]
    assert {s: rate for s, rate in rates.items() if s not in skipped} == {
        s: rate for s, rate in as_usual.items() if s not in skipped
    }


@pytest.mark.parametrize("kind", ["linear", "cosine", "OneCycleLR", "CosineAnnealingLR"])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_resumed_with_another_batch_size_the_schedule_still_ends_with_the_training(
    tmp_path: Path, kind: str, batch_size: int
):
    first = Run(Setup(scheduler=kind)).train(lambda step: step == 20)
    first.save(tmp_path)
    alone = Run(Setup(scheduler=kind, policy=None)).train()
    resumed = Run(Setup(scheduler=kind, batch_size=batch_size)).load(tmp_path).train()
    # A pass is as far through the schedule in both, whatever its steps are.
    done = len(alone.at_pass_end) - len(resumed.at_pass_end)
    fresh = Run(Setup(scheduler=kind, batch_size=batch_size, policy=None)).train()
    twin = fresh if kind in ("linear", "cosine") else alone
    assert resumed.at_pass_end == pytest.approx(twin.at_pass_end[done:], abs=1e-12)
    assert max(len(entry["index"]) for entry in resumed.journal) == batch_size


# ---- checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setup",
    [
        NOISY,
        Setup(accumulate=4, seedable=True, epochs=6),
        Setup(policy="none", noise=True, item_seed=True, seedable=True, accumulate=3, epochs=3),
        Setup(samples=22, epochs=5, noise=True, item_seed=True, more={"score": "timestep"}),
        Setup(samples=22, epochs=5, noise=True, item_seed=True, policy="variance", accumulate=2),
    ],
    ids=["noise", "accumulated", "policy none", "by noise level", "by gradient"],
)
def test_resumed_at_any_step_it_is_the_same_training_to_the_bit(tmp_path: Path, setup: Setup):
    straight = Run(setup)
    parameters: dict[int, list[float]] = {}

    def save(step: int) -> None:
        if straight.accelerator.sync_gradients:  # accelerate's own checkpoints hold no half-accumulated gradients
            straight.save(tmp_path / str(step))
            parameters[step] = straight.parameters

    straight.train(save)
    assert set(parameters) == {entry["step"] for entry in straight.journal if entry["updated"]}
    assert max(parameters) == len(straight.journal)
    books = straight.infobatch.summary()
    for step in parameters:
        resumed = Run(setup).load(tmp_path / str(step))
        assert resumed.parameters == parameters[step]
        resumed.train()
        assert resumed.journal == straight.journal[step:]
        assert resumed.parameters == straight.parameters
        ours = resumed.infobatch.summary()
        assert {**ours, "wall_time_s": 0} == {**books, "wall_time_s": 0}
    assert resumed.journal == [] and resumed.infobatch.passes_done == setup.epochs


@pytest.mark.parametrize("policy", ["infobatch", "none"])
def test_with_item_seed_every_visit_draws_numbers_of_its_own(policy: str):
    run = Run(Setup(policy=policy, noise=True, item_seed=True))
    drawn, seen = set(), 0
    for _ in range(3):
        for batch in run.loader:
            noise = batch["x"] - run.loader.dataset.x[batch["index"]]
            drawn |= {round(float(each), 5) for each in noise[:, 0]}
            seen += len(noise)
            run.infobatch.weigh(batch["index"].float())
    assert len(drawn) > 0.97 * seen  # rounded, a few may meet
    assert (seen == 3 * 46) == (policy == "none")


def test_resumed_without_item_seed_samples_and_weights_are_the_same(tmp_path: Path):
    setup = Setup(workers=2, epochs=4)
    straight = Run(setup)
    straight.train(lambda step: straight.save(tmp_path) if step == 15 else None)
    resumed = Run(setup).load(tmp_path).train()
    assert resumed.journal == straight.journal[15:]


def test_a_resumed_pass_reads_nothing_of_what_came_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = Run(TAILED).train(lambda step: step == 16)
    first.save(tmp_path)
    resumed = Run(TAILED).load(tmp_path)
    rest = plan_of(resumed)[0][4 * 4 :].tolist()  # four steps of its second pass were made
    read: list[int] = []
    item = Points.__getitem__
    monkeypatch.setattr(Points, "__getitem__", lambda self, index: read.append(index) or item(self, index))
    resumed.train(lambda step: resumed.infobatch.passes_done == 2)
    assert read == rest and len(rest) > 4


def test_policy_none_skips_through_the_seedable_samplers_order(tmp_path: Path):
    setup = Setup(policy="none", seedable=True)
    straight = Run(setup)
    straight.train(lambda step: straight.save(tmp_path) if step == 17 else None)
    resumed = Run(setup).load(tmp_path).train()
    assert resumed.journal == straight.journal[17:]
    assert resumed.parameters == straight.parameters


def test_a_checkpoint_without_our_state_is_refused_before_anything_is_loaded(tmp_path: Path):
    alone = Run(Setup(policy=None)).train(lambda step: step == 5)
    alone.accelerator.save_state(str(tmp_path))
    ours = Run(TAILED)
    before = ours.parameters
    with pytest.raises(ValueError, match=f"{tmp_path} was saved without InfoBatch"):
        ours.load(tmp_path)
    assert ours.parameters == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 45}, "scores 46 samples, this data set has 45"),
        ({"epochs": 9}, "training of 8 epochs, this one has 9"),
        ({"policy": "random"}, "'policy': 'infobatch'.* this run has .*'policy': 'random'"),
        ({"prune_ratio": 0.25}, "'prune_ratio': 0.5.* this run has .*'prune_ratio': 0.25"),
        ({"more": {"fingerprint": "b"}}, "fingerprint 'a', this data set has 'b'"),
        ({"more": {"fingerprint": "a", "delta": 0.5}}, "'delta': 0.875.* this run has .*'delta': 0.5"),
        ({"more": {"fingerprint": "a", "score": "timestep"}}, "'score': 'raw'.* this run has .*'score': 'timestep'"),
        ({"more": {"fingerprint": "a", "score_ema": 0.5}}, "'score_ema': 0.0.* this run has .*'score_ema': 0.5"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_both_values(tmp_path: Path, change: dict[str, Any], message: str):
    same: dict[str, Any] = {"more": {"fingerprint": "a"}}
    Run(Setup(**same)).train(lambda step: step == 14).save(tmp_path)
    with pytest.raises(ValueError, match=message):
        Run(Setup(**{**same, **change})).load(tmp_path)
    Run(Setup(**same)).load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("version", 99, "version 99"), ("iterations", -1, "damaged at 'iterations'"), ("wall_time_s", "x", "wall_time_s")],
)
def test_a_newer_or_damaged_state_is_refused(key: str, value: Any, message: str):
    run = Run(TAILED).train(lambda step: step == 14)
    state = {**run.infobatch.state_dict(), key: value}
    with pytest.raises(ValueError, match=message):
        Run(TAILED).infobatch.load_state_dict(state)


def test_the_state_is_plain(tmp_path: Path):
    run = Run(TAILED).train(lambda step: step == 14)
    run.save(tmp_path)
    (path,) = tmp_path.glob("custom_checkpoint_*.pkl")
    state = torch.load(path, weights_only=True)
    assert state["num_epochs"] == 8 and state["iterations"] == 14 and not state["unmerged"]


# ---- what is refused --------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(8))


class Pairs(BatchSampler):
    pass


class Nothing(Dataset):
    def __len__(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("loader", "arguments", "message"),
    [
        (lambda: DataLoader(Points(8), batch_size=4, sampler=WeightedRandomSampler([1.0] * 8, 8)), {}, "Weighted"),
        (lambda: DataLoader(Points(8), batch_size=4, sampler=range(5)), {}, "range of 5 draws from 8 samples"),
        (lambda: DataLoader(Points(8), batch_sampler=Pairs(range(8), 2, False)), {}, "has a Pairs of its own"),
        (lambda: DataLoader(Stream(), batch_size=4), {}, "Stream is an iterable data set"),
        (lambda: DataLoader(Points(8), batch_size=None), {}, "batch_size=None"),
        (lambda: DataLoader(Nothing(), batch_size=4, sampler=[]), {}, "empty: 0 samples"),
        (lambda: DataLoader(Points(8), batch_size=9), {}, "batch holds 9 samples but the data set only 8"),
        (lambda: DataLoader(Points(8), batch_size=9, drop_last=True), {"policy": "none"}, "drop_last=True leaves no"),
        (lambda: DataLoader(Points(8), batch_size=4), {"prune_ratio": 1.5}, "prune_ratio=1.5"),
        (lambda: DataLoader(Points(8), batch_size=4), {"delta": 0}, "delta=0"),
        (lambda: DataLoader(Points(8), batch_size=4), {"policy": "best"}, "unknown policy 'best'"),
        (lambda: DataLoader(Points(8), batch_size=4), {"seed": -1}, "seed=-1"),
        (lambda: DataLoader(Points(8), batch_size=4), {"score_ema": 1}, "score_ema=1"),
        (lambda: DataLoader(Points(8), batch_size=4), {"score": "best"}, "unknown score 'best'"),
        (lambda: DataLoader(Points(8), batch_size=4), {"num_epochs": 0}, "num_epochs=0"),
    ],
)  # fmt: skip
def test_what_cannot_be_pruned_is_refused_with_its_value(loader: Any, arguments: dict[str, Any], message: str):
    forget_accelerators()
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match=message):
        AcceleratedInfoBatch(accelerator, loader(), **{"num_epochs": 4, **arguments})
    assert not accelerator._custom_objects  # nothing is left behind in the user's checkpoints


def test_a_loader_that_is_prepared_already_is_refused():
    forget_accelerators()
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match="prepared already"):
        AcceleratedInfoBatch(accelerator, accelerator.prepare(DataLoader(Points(8), batch_size=4)), 4)


def test_prepare_wants_the_very_loader():
    loader = DataLoader(Points(8), batch_size=4)
    infobatch = setup_of(loader)
    with pytest.raises(ValueError, match="was not given the train dataloader"):
        infobatch.prepare(torch.nn.Linear(1, 1), DataLoader(Points(8), batch_size=4))


def test_other_loaders_are_prepared_as_ever():
    train, test = DataLoader(Points(8), batch_size=4), DataLoader(Points(8), batch_size=2)
    infobatch = setup_of(train)
    train, test = infobatch.prepare(train, test)
    assert [batch["index"].tolist() for batch in test] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert infobatch.passes_done == 0


def test_what_is_no_accelerator_is_refused():
    with pytest.raises(ValueError, match="got str"):
        AcceleratedInfoBatch("accelerator", DataLoader(Points(8), batch_size=4), 4)  # type: ignore[arg-type]


def test_a_stateful_dataloader_is_refused():
    forget_accelerators()
    accelerator = Accelerator(cpu=True)
    accelerator.dataloader_config = DataLoaderConfiguration()
    accelerator.dataloader_config.use_stateful_dataloader = True  # torchdata itself is not installed
    with pytest.raises(ValueError, match="use_stateful_dataloader=True"):
        AcceleratedInfoBatch(accelerator, DataLoader(Points(8), batch_size=4), 4)


def test_weighing_without_a_batch_or_in_other_shapes_is_refused():
    run = Run(TAILED)
    with pytest.raises(ValueError, match="no batch is in hand"):
        run.infobatch.weigh(torch.ones(4))
    with pytest.raises(ValueError, match="no batch was weighed yet"):
        _ = run.infobatch.loss
    next(iter(run.loader))
    for losses, shape in ((torch.tensor(1.0), r"\(\)"), (torch.ones(3), r"\(3,\)"), (torch.ones(9, 1), r"\(9, 1\)")):
        with pytest.raises(ValueError, match=rf"losses of 4 samples.* got shape {shape}: use reduction='none'"):
            run.infobatch.weigh(losses)
    with pytest.raises(ValueError, match=r"scores of 4 samples.* got shape \(2,\)"):
        run.infobatch.weigh(torch.ones(4), scores=torch.ones(2))
    assert run.infobatch.summary()["iterations"] == 0
    run.infobatch.weigh(torch.ones(4))


# ---- what a run leaves behind -----------------------------------------------------------------------------


def test_summary_logs_and_files_tell_what_was_done(tmp_path: Path):
    run = Run(TAILED)
    assert run.infobatch.logs() == {}
    run.train()
    by_pass = passes(run.journal)
    summary = run.infobatch.summary()
    seen = len(visits(run.journal))
    assert list(summary)[-1] == "per_pass"
    assert {key: summary[key] for key in summary if key not in ("wall_time_s", "per_pass")} == {
        "policy": "infobatch", "prune_ratio": 0.5, "delta": 0.875, "score": "raw", "score_ema": 0.0, "num_samples": 46,
        "passes_done": 8, "passes_total": 8, "visits": seen, "visits_full": 8 * 46,
        "saved_ratio": pytest.approx(1 - seen / (8 * 46)), "visits_skipped": 0, "forward_visits": 0,
        "nonfinite_losses": 0, "unusable_visits": 0, "unscored_samples": 0, "seed": 0,
        "iterations": len(run.journal), "iterations_full": 8 * 12,
    }  # fmt: skip
    assert 0 < summary["wall_time_s"] < 60
    assert [entry["kept"] for entry in summary["per_pass"]] == [len(visits(steps)) for steps in by_pass.values()]
    last = summary["per_pass"][-1]
    logs = run.infobatch.logs()
    assert logs == {
        "infobatch/kept_ratio": 1.0,
        "infobatch/saved_ratio": summary["saved_ratio"],
        "infobatch/score_mean": last["score_mean"],
        **{f"infobatch/{name}": last[name] for name in ("worth", "cost", "efficiency", "limit")},
    }  # the last pass is a full one, which has no threshold
    assert last["score_mean"] == pytest.approx(run.pruner.store.values.double().mean().item())
    run.infobatch.write(tmp_path / "new" / "place", names=[f"point {i}" for i in range(46)])
    written = json.loads((tmp_path / "new/place" / SUMMARY_FILE).read_text())
    assert {**written, "wall_time_s": 0} == {**summary, "wall_time_s": 0}
    scores = read_scores(tmp_path / "new/place")
    assert scores["score"].tolist() == run.pruner.store.values.tolist()
    assert scores["times_seen"].tolist() == [visits(run.journal).count(i) for i in range(46)]
    assert scores["name"][45] == "point 45"


def test_a_threshold_is_logged_after_a_pruned_pass():
    run = Run(TAILED)
    run.train(lambda step: run.infobatch.passes_done == 2)
    run.infobatch.merge()
    logs = run.infobatch.logs()
    (first, second) = passes(run.journal).values()
    assert logs["infobatch/kept_ratio"] == len(visits(second)) / 46 < 1
    mean = np.mean([np.float64(np.float32(loss)) for entry in first for loss in entry["losses"]])
    assert logs["infobatch/threshold"] == pytest.approx(float(mean), rel=1e-6)


def test_a_full_disk_ends_no_training(tmp_path: Path):
    run = Run(TAILED)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="could not write to .*file"):
        run.infobatch.write(tmp_path / "file")


def test_a_directory_of_another_run_is_refused(tmp_path: Path):
    Run(TAILED).infobatch.write(tmp_path)
    Run(TAILED).infobatch.check_output(tmp_path)
    with pytest.raises(ValueError, match=r"prune_ratio=0\.5, this run has prune_ratio=0\.25"):
        Run(Setup(prune_ratio=0.25)).infobatch.check_output(tmp_path)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_updates_done_are_counted_and_those_expected_exact_from_the_last_pruned_pass_on(accumulate: int):
    run = Run(Setup(accumulate=accumulate))
    assert run.infobatch.updates_expected == 8 * math.ceil(12 / accumulate)
    expected: list[tuple[int, int]] = []
    made = 0

    def look(step: int) -> None:
        nonlocal made
        made += run.journal[-1]["updated"]
        if run.journal[-1]["updated"]:
            assert run.infobatch.updates_done == made
        expected.append((run.journal[-1]["pass"], run.infobatch.updates_expected))
        assert run.infobatch.updates_expected >= run.infobatch.updates_done

    run.train(look)
    assert {total for current, total in expected if current >= 6} == {made}
    assert max(total for _, total in expected) <= 8 * math.ceil(12 / accumulate)


def test_epochs_beyond_the_last_go_on_with_full_passes():
    run = Run(Setup(epochs=2)).train()
    assert run.infobatch.passes_done == 2
    end = run.scheduler.get_last_lr()
    seen = []
    for batch in run.loader:
        seen += batch["index"].tolist()
        run.infobatch.weigh(torch.ones(len(batch["index"])))
        run.optimizer.step()
        run.scheduler.step()
    assert sorted(seen) == list(range(46)) and run.scheduler.get_last_lr() == end
    assert run.infobatch.passes_done == 3


# ---- helpers ----------------------------------------------------------------------------------------------


def in_a_pruned_pass(setup: Setup) -> Run:
    """A run at the begin of its second pass."""
    run = Run(setup)
    run.train(lambda step: run.infobatch.passes_done == 1)
    run.infobatch.merge()
    assert plan_of(run)[1].max() > 1
    return run


# ---- found late --------------------------------------------------------------------------------------------------


class Counter:
    """Something of the user's that is saved beside us."""

    def state_dict(self) -> dict[str, int]:
        return {"n": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def test_a_checkpoint_with_the_users_own_objects_but_not_ours_is_refused_before_anything_is_loaded(
    tmp_path: Path,
) -> None:
    alone = Run(Setup(policy=None))
    alone.accelerator.register_for_checkpointing(Counter())
    alone.train(lambda step: step == 5).accelerator.save_state(str(tmp_path))
    ours = Run(Setup())
    ours.accelerator.register_for_checkpointing(Counter())
    before = ours.parameters
    with pytest.raises(ValueError, match="was saved without InfoBatch"):
        ours.load(tmp_path)
    assert ours.parameters == before


def test_a_checkpoint_of_another_length_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    Run(Setup()).train(lambda step: step == 14).save(tmp_path)
    other = Run(Setup(epochs=9))
    before = other.parameters
    with pytest.raises(ValueError, match="8 epochs, this one has 9"):
        other.load(tmp_path)
    assert other.parameters == before


def test_a_scheduler_that_counts_epochs_is_refused_at_its_first_step() -> None:
    run = Run(Setup(scheduler="StepLR"))
    with pytest.raises(ValueError, match="was stepped after 0 updates and then after 12"):
        for batch in run.loader:
            run.infobatch.weigh((run.model(batch["x"]) - batch["y"]) ** 2)
        run.scheduler.step()


def test_gradients_accumulated_by_hand_are_noticed() -> None:
    run = Run(Setup())
    with pytest.raises(ValueError, match=r"stepped after 8 updates and then after 12.*accelerator.accumulate"):
        for i, batch in enumerate(run.loader):
            run.infobatch.weigh((run.model(batch["x"]) - batch["y"]) ** 2)
            if i % 4 == 3:
                run.scheduler.step()


def test_a_scheduler_that_cannot_follow_is_refused() -> None:
    with pytest.raises(ValueError, match="a ChainedScheduler does not say how many steps it has taken"):
        Run(Setup(scheduler="ChainedScheduler"))


def test_a_scheduler_of_validations_is_left_to_accelerate() -> None:
    run = Run(Setup(scheduler="ReduceLROnPlateau"))
    assert type(run.scheduler).__module__.startswith("accelerate")


def test_skipping_batches_is_refused_with_the_reason() -> None:
    run = Run(Setup())
    with pytest.raises(AttributeError, match="leave out skip_first_batches"):
        run.accelerator.skip_first_batches(run.loader, 2)


def test_a_script_may_leave_out_the_steps_of_skipped_updates() -> None:
    run = Run(Setup())
    for i, batch in enumerate(run.loader):
        run.infobatch.weigh((run.model(batch["x"]) - batch["y"]) ** 2)
        if i not in (0, 1, 5):  # gradients overflowed
            run.scheduler.step()
    assert run.scheduler.scheduler.last_epoch == run.infobatch.updates_done == 12


def test_schedulers_that_cannot_follow_are_refused_or_warned_of() -> None:
    run = Run(Setup())
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    loader = DataLoader(Points(46), 4, shuffle=True)
    infobatch = AcceleratedInfoBatch(accelerator, loader, 8)
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer.optimizer, 2)
    with pytest.raises(ValueError, match="step_scheduler_with_optimizer=False"):
        infobatch.prepare(loader, scheduler)
    accelerator = Accelerator(cpu=True)
    infobatch = AcceleratedInfoBatch(accelerator, loader, 8)
    accelerator.prepare(scheduler)
    prepared = infobatch.prepare(loader)
    with pytest.warns(UserWarning, match="a StepLR was not given to infobatch.prepare"):
        next(iter(prepared))


def test_accumulation_across_the_ends_of_passes_is_refused() -> None:
    plugin = GradientAccumulationPlugin(num_steps=4, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    with pytest.raises(ValueError, match="sync_with_dataloader=False"):
        AcceleratedInfoBatch(accelerator, DataLoader(Points(46), 4, shuffle=True), 8)


def test_a_second_one_takes_the_place_of_the_first(tmp_path: Path) -> None:
    """As find_executable_batch_size makes them."""
    accelerator = Accelerator(cpu=True)
    for batch_size in (23, 4):
        loader = DataLoader(Points(46), batch_size, shuffle=True)
        infobatch = AcceleratedInfoBatch(accelerator, loader, 8)
    accelerator.save_state(str(tmp_path))
    assert len(list(tmp_path.glob("custom_checkpoint_*.pkl"))) == 1
    accelerator.load_state(str(tmp_path))
    assert infobatch.passes_done == 0


def test_gathered_metrics_of_a_pruned_pass_are_whole() -> None:
    run = Run(Setup(epochs=3, prune_ratio=0.5))
    sizes = []
    for _ in range(3):
        for batch in run.loader:
            run.infobatch.weigh((run.model(batch["x"]) - batch["y"]) ** 2)
            sizes.append(len(run.accelerator.gather_for_metrics(batch["index"])))
    kept = [entry["kept"] for entry in run.infobatch.summary()["per_pass"]]
    assert kept[1] < 46
    assert sum(sizes) == sum(kept)


def test_the_loader_has_what_scripts_ask_of_one() -> None:
    run = Run(Setup())
    run.loader.set_epoch(3)
    assert run.loader.total_batch_size == 4
    assert not hasattr(run.loader, "sampler")
    assert run.infobatch.passes_done == 0


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_updates_of_an_unpruned_training_are_known_from_its_start(accumulate: int) -> None:
    run = Run(Setup(policy="none", epochs=3, accumulate=accumulate))
    expected = []
    run.train(lambda step: expected.append(run.infobatch.updates_expected))
    assert set(expected) == {3 * math.ceil(12 / accumulate)}
    assert run.infobatch.updates_done == expected[-1]


def test_a_pass_too_many_is_warned_of() -> None:
    run = Run(Setup(epochs=2)).train()
    with pytest.warns(UserWarning, match=r"pass 3 of a training of 2 epochs.*max_train_steps=.*range\("):
        next(iter(run.loader))
    with warnings.catch_warnings():  # it is said once
        warnings.simplefilter("error")
        next(iter(run.loader))


def test_resume_code_of_old_that_skips_a_whole_pass_is_told_what_to_delete(tmp_path: Path):
    first = Run(TAILED).train(lambda step: step == 3)
    first.save(tmp_path)
    resumed = Run(TAILED).load(tmp_path)
    with pytest.warns(UserWarning, match="rest of a resumed pass .* not weighed.* delete what skips batches"):
        for _ in resumed.loader:
            continue


def test_a_scheduler_that_nobody_was_given_is_noticed_by_its_optimizer():
    forget_accelerators()
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(Points(20), batch_size=4, shuffle=True)
    infobatch = AcceleratedInfoBatch(accelerator, loader, 8)
    optimizer = torch.optim.SGD(torch.nn.Linear(4, 1).parameters(), 0.1)
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    optimizer, loader = infobatch.prepare(optimizer, loader)
    with pytest.warns(UserWarning, match="the optimizer has a learning-rate scheduler that was not given to infobatch"):
        next(iter(loader))


def test_a_pass_that_is_saved_at_its_end_is_followed_by_the_whole_of_the_next(tmp_path: Path):
    straight = Run(TAILED).train()
    first = Run(TAILED).train(lambda step: step == 3)
    first.save(tmp_path)
    resumed = Run(TAILED).load(tmp_path)
    resumed.train(lambda step: resumed.infobatch.merge())  # as before a checkpoint at every step
    assert first.journal + resumed.journal == straight.journal


def test_a_look_at_several_batches_counts_for_nothing():
    run = Run(Setup(samples=32))
    for _ in range(3):
        for i, _ in enumerate(run.loader):
            if i == 3:
                break
    seen = [index for batch in run.loader for index in weighed(run, batch)]
    assert sorted(seen) == list(range(32))
    entry = run.infobatch.summary()["per_pass"][0]
    assert (entry["kept"], entry["skipped"]) == (32, 0)


def weighed(run: Run, batch: dict[str, torch.Tensor]) -> list[int]:
    run.infobatch.weigh(batch["index"].float())
    return batch["index"].tolist()


def test_two_data_sets_keep_their_states(tmp_path: Path):
    forget_accelerators()
    accelerator = Accelerator(cpu=True)
    loaders = [DataLoader(Points(samples), 4, shuffle=True) for samples in (16, 24)]
    both = [AcceleratedInfoBatch(accelerator, loader, 4) for loader in loaders]
    assert len([each for each in accelerator._custom_objects if isinstance(each, AcceleratedInfoBatch)]) == 2
    again = AcceleratedInfoBatch(accelerator, DataLoader(Points(16), 2, shuffle=True), 4)  # a smaller batch
    assert [each for each in accelerator._custom_objects if each in (*both, again)] == [both[1], again]
