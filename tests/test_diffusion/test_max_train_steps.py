"""A training that is counted in optimiser steps, as by ``--max_train_steps``: its last pass may be partial."""

from __future__ import annotations

import math
import warnings
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")

from accelerate import Accelerator
from torch.utils.data import DataLoader

from infobatch_mm.accelerated import AcceleratedInfoBatch
from infobatch_mm.core import ending

from .toy import Points, Run, Setup

#: Updates of 12 batches of an epoch: less than an epoch, one, whole epochs, and parts of one.
STEPS = {1: (5, 12, 87, 95, 96), 4: (2, 3, 22, 23, 24)}
CASES = [(accumulate, steps) for accumulate, each in STEPS.items() for steps in each]


pytestmark = pytest.mark.usefixtures("no_accelerator_of_another_test")


def passes(journal: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [list(steps) for _, steps in groupby(journal, key=lambda entry: entry["pass"])]


def rates(run: Run) -> list[float]:
    return [entry["lr"] for entry in run.journal if entry["updated"]]


@pytest.mark.filterwarnings("ignore:InfoBatch")
@pytest.mark.parametrize(("accumulate", "steps"), CASES)
def test_it_ends_with_the_schedule_and_in_no_more_steps(accumulate: int, steps: int) -> None:
    whole = math.ceil(12 / accumulate)
    alone = Run(Setup(policy=None, accumulate=accumulate, steps=steps)).train()
    ours = Run(Setup(accumulate=accumulate, steps=steps)).train()
    assert len(rates(alone)) == steps and rates(alone)[-1] == 0
    assert ours.infobatch.passes_done == ours.infobatch.num_passes == math.ceil(steps / whole)
    assert rates(ours)[-1] == rates(alone)[-1]
    assert ours.infobatch.updates_done == len(rates(ours)) <= steps
    assert (len(rates(ours)) < steps) == (steps > 2 * whole)
    # At the end of each pass it stands where the unpruned run does.
    ends = [min(steps, (p + 1) * whole) for p in range(ours.infobatch.num_passes)]
    assert ours.at_pass_end == [rates(alone)[end - 1] for end in ends]
    # What is last is a part of a full pass, as long as the unpruned run's, each sample once, of weight 1.
    last = passes(ours.journal)[-1]
    seen = [index for entry in last for index in entry["index"]]
    rest = steps - (ours.infobatch.num_passes - 1) * whole
    assert len(last) == min(12, rest * accumulate) and len(set(seen)) == len(seen) == min(46, 4 * len(last))
    assert last[-1]["updated"]


@pytest.mark.filterwarnings("ignore:InfoBatch")
@pytest.mark.parametrize(("accumulate", "steps"), [(1, 87), (1, 5), (4, 22), (1, 96)])
def test_without_pruning_it_is_accelerates_own_to_the_bit_and_ends_by_itself(accumulate: int, steps: int) -> None:
    setup = {"accumulate": accumulate, "steps": steps, "noise": True}
    alone = Run(Setup(policy=None, **setup)).train()
    ours = Run(Setup(policy="none", **setup)).train()
    assert ours.journal == alone.journal and ours.parameters == alone.parameters
    assert ours.infobatch.passes_done == ours.infobatch.num_passes
    books = ours.infobatch.summary()
    assert books["visits"] == books["visits_full"] == sum(len(entry["index"]) for entry in ours.journal)
    assert books["iterations"] == books["iterations_full"] == len(ours.journal)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_script_that_recomputes_its_epochs_does_them_all(accumulate: int) -> None:
    """As diffusers' scripts do after ``prepare``; they break at the last step, which a pruned run does not reach."""
    steps = 100 // accumulate
    run = Run(Setup(accumulate=accumulate, steps=steps, epochs=100))
    per_epoch = math.ceil(len(run.loader) / accumulate)
    epochs, global_step, broken = math.ceil(steps / per_epoch), 0, False
    for _ in range(run.infobatch.passes_done, epochs):
        for batch in run.loader:
            with run.accelerator.accumulate(run.model):
                run.accelerator.backward(run.infobatch.weigh((run.model(batch["x"]) - batch["y"]) ** 2))
                run.optimizer.step()
                run.scheduler.step()
                run.optimizer.zero_grad()
            global_step += run.accelerator.sync_gradients
            if global_step >= steps:
                broken = True
                break
    assert not broken and global_step < steps
    books = run.infobatch.summary()
    assert books["passes_done"] == epochs == run.infobatch.num_passes
    assert books["passes_total"] == pytest.approx(steps / per_epoch, abs=0.03)
    assert books["saved_ratio"] > 0.1 and run.scheduler.get_last_lr() == [0]
    assert len(run.infobatch.summary()["per_pass"]) == epochs


def test_a_script_that_breaks_with_its_last_batch_has_done_its_passes() -> None:
    run = Run(Setup(prune_ratio=0.0, steps=87))
    run.train(lambda step: step == 84)
    assert ending._left == (7, 8)
    run.train(lambda step: step == 87)  # nothing is pruned: the break is reached
    assert ending._left is None
    books = run.infobatch.summary()
    assert (books["passes_done"], books["visits"], len(books["per_pass"])) == (8, books["visits_full"], 8)
    assert books == {**run.infobatch.summary(), "wall_time_s": books["wall_time_s"]}


def test_steps_take_the_place_of_epochs_and_one_of_both_is_needed() -> None:
    loader = DataLoader(Points(46), 4, shuffle=True)
    assert AcceleratedInfoBatch(Accelerator(cpu=True), loader, 100, max_train_steps=30).num_passes == 3
    assert AcceleratedInfoBatch(Accelerator(cpu=True), loader, max_train_steps=30).num_passes == 3
    with pytest.raises(ValueError, match=r"give num_epochs.*or max_train_steps"):
        AcceleratedInfoBatch(Accelerator(cpu=True), loader)
    with pytest.raises(ValueError, match=r"max_train_steps=0 is below 1"):
        AcceleratedInfoBatch(Accelerator(cpu=True), loader, max_train_steps=0)
    with pytest.raises(ValueError, match=r"max_train_steps=7\.5 is not a whole number"):
        AcceleratedInfoBatch(Accelerator(cpu=True), loader, max_train_steps=7.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_updates_expected_end_as_those_made(accumulate: int) -> None:
    steps = 90 // accumulate
    run = Run(Setup(accumulate=accumulate, steps=steps))
    assert run.infobatch.updates_expected == steps
    assert len(run.loader) == 12
    expected: list[tuple[int, int]] = []

    def look(step: int) -> None:
        expected.append((run.journal[-1]["pass"], run.infobatch.updates_expected))
        assert run.infobatch.updates_done <= run.infobatch.updates_expected <= steps

    run.train(look)
    last_pruned = max(entry["pass"] for entry in run.infobatch.summary()["per_pass"] if entry["threshold"] is not None)
    assert {total for current, total in expected if current >= last_pruned} == {run.infobatch.updates_done}


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("policy", ["infobatch", "none"])
def test_the_books_count_what_was_visited(policy: str, drop_last: bool) -> None:
    run = Run(Setup(policy=policy, drop_last=drop_last, epochs=4))
    run.train()
    books = run.infobatch.summary()
    visits = [sum(len(entry["index"]) for entry in steps) for steps in passes(run.journal)]
    assert [entry["kept"] for entry in books["per_pass"]] == visits
    assert max(entry["kept_ratio"] for entry in books["per_pass"]) == 1
    assert books["visits"] == sum(visits) and books["visits_full"] == 4 * (44 if drop_last else 46)


# ---- checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("policy", ["infobatch", "none"])
def test_resumed_at_any_step_it_is_the_same_training(tmp_path: Path, policy: str, accumulate: int) -> None:
    setup = Setup(policy=policy, steps=31 // accumulate, accumulate=accumulate, seedable=True)
    straight = Run(setup)
    saved: list[int] = []

    def save(step: int) -> None:
        if straight.accelerator.sync_gradients:
            straight.save(tmp_path / str(step))
            saved.append(step)

    straight.train(save)
    books = straight.infobatch.summary()
    for step in saved:
        resumed = Run(setup).load(tmp_path / str(step)).train()
        assert resumed.journal == straight.journal[step:]
        assert resumed.parameters == straight.parameters
        assert {**resumed.infobatch.summary(), "wall_time_s": 0} == {**books, "wall_time_s": 0}


@pytest.mark.filterwarnings("ignore:the LambdaLR")
def test_a_checkpoint_of_another_length_is_refused_with_both(tmp_path: Path) -> None:
    Run(Setup(steps=40)).train(lambda step: step == 14).save(tmp_path)
    same = Run(Setup(steps=40)).load(tmp_path)
    assert same.infobatch.updates_done == 14
    with pytest.raises(ValueError, match="of a training of 40 steps, 12 to an epoch, this one has 41, 12 to an epoch"):
        Run(Setup(steps=41)).load(tmp_path)
    with pytest.raises(ValueError, match=r"40 steps.*this one has 48, 12 to an epoch.*use max_train_steps=40"):
        Run(Setup(epochs=4)).load(tmp_path)
    Run(Setup(epochs=3)).train(lambda step: step == 14).save(tmp_path)
    Run(Setup(steps=36)).load(tmp_path)  # which are three epochs
    with pytest.raises(ValueError, match=r"training of 36 steps.*this one has 40.*use max_train_steps=36"):
        Run(Setup(steps=40)).load(tmp_path)


def test_with_another_batch_size_as_many_epochs_of_it_go_on(tmp_path: Path) -> None:
    Run(Setup(steps=40)).train(lambda step: step == 14).save(tmp_path)
    with pytest.raises(ValueError, match=r"40 steps, 12 to an epoch, this one has 40, 6 to an epoch.*_steps=20"):
        Run(Setup(steps=40, batch_size=8)).load(tmp_path)
    resumed = Run(Setup(steps=20, batch_size=8)).load(tmp_path).train()
    assert resumed.infobatch.passes_done == resumed.infobatch.num_passes == 4
    assert rates(resumed)[-1] == 0
    last = passes(resumed.journal)[-1]
    assert sum(len(entry["index"]) for entry in last) == 2 * 8
    # In steps of other batches a length need not come out even.
    Run(Setup(steps=41)).train(lambda step: step == 14).save(tmp_path)
    assert Run(Setup(steps=20, batch_size=8)).load(tmp_path).infobatch.passes_done == 1
    with pytest.raises(ValueError, match="of a training of 41 steps"):
        Run(Setup(steps=22, batch_size=8)).load(tmp_path)


@pytest.mark.parametrize("kind", ["OneCycleLR", "CosineAnnealingLR"])
def test_a_schedule_of_the_checkpoints_batches_ends_with_the_training(tmp_path: Path, kind: str) -> None:
    Run(Setup(steps=40, scheduler=kind)).train(lambda step: step == 14).save(tmp_path)
    alone = Run(Setup(steps=40, scheduler=kind, policy=None)).train()
    resumed = Run(Setup(steps=20, batch_size=8, scheduler=kind)).load(tmp_path).train()
    assert rates(resumed)[-1] == pytest.approx(rates(alone)[-1], abs=1e-12)


def test_gathered_metrics_of_a_partial_pass_are_whole() -> None:
    run = Run(Setup(steps=29, prune_ratio=0.0))
    sizes: list[int] = []
    run.train(lambda step: sizes.append(len(run.accelerator.gather_for_metrics(torch.zeros(4)))))
    assert sum(sizes[24:]) == 4 * 5 and sum(sizes[:12]) == 46


def test_nothing_is_said_of_a_training_that_fits() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Run(Setup(steps=90))
        Run(Setup(steps=22, accumulate=4))
