"""Repeated augmentation: passes over a third of the plan, every sample three times in a row."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmpretrain")

import numpy as np
import torch
from mmengine.config import Config
from mmpretrain.datasets.samplers import RepeatAugSampler

from infobatch_mm.core import EpochSchedule, PlanSampler, Pruner
from infobatch_mm.policies import InfoBatchPolicy

from .processes import Run
from .test_mmpretrain_runs import SMOOTH, assert_goes_on
from .test_resume import KillAt, Killed
from .toy_classifier import MIXING, PER_EPOCH, B, N, config, train

REPEATS = 3
DISTINCT = math.ceil(N / REPEATS)
OVERRIDES: dict[str, Any] = {
    "train_dataloader.sampler": dict(_delete_=True, type="RepeatAugSampler", shuffle=True, num_repeats=REPEATS),
    "param_scheduler": [dict(type="PolyLR", by_epoch=True, convert_to_iter_based=True)],
}


def runs(indices: list[int]) -> list[tuple[int, int]]:
    """Samples in the order of their visits, with the number of visits in a row."""
    return [(index, len(list(visits))) for index, visits in groupby(indices)]


def assert_repeated(visits: list[int]) -> None:
    """Every sample in one row of three, but the last, which is as long as the rest."""
    lengths = [length for _, length in runs(visits)]
    assert len(lengths) == len(set(visits)) == math.ceil(len(visits) / REPEATS)
    assert set(lengths[:-1]) == {REPEATS}


def passes_of(summary: dict[str, Any], visits: list[Any]) -> list[list[Any]]:
    """Visits of each pass, by the counts that the summary states."""
    passes, start = [], 0
    for entry in summary["per_pass"]:
        passes.append(visits[start : start + entry["kept"]])
        start += entry["kept"]
    assert start == len(visits)
    return passes


def test_a_pass_repeats_its_samples_as_the_host_does(tmp_path: Path) -> None:
    _, host = train(config(tmp_path / "host", custom_hooks=[], **OVERRIDES))
    runner, ours = train(config(tmp_path / "ours", **OVERRIDES))
    hosts_own = RepeatAugSampler(range(N), seed=0, num_repeats=REPEATS)
    summary = json.loads((tmp_path / "ours/infobatch_summary.json").read_text())
    first, *pruned, last = passes_of(summary, sum(ours.indices, []))
    for full in (first, last):
        assert len(full) == N and len(set(full)) == DISTINCT
        assert [length for _, length in runs(full)] == [length for _, length in runs(list(hosts_own))]
    assert first[: len(last)] != last
    # Of the few samples that the first pass has scored, none can stand for more than twice the nominal number.
    assert any(len(visits) < N for visits in pruned)
    for visits in pruned:
        assert len(visits) == N or len(visits) % B == 0
        assert_repeated(visits)
    weights = sum(ours.weights, [])
    for visits, each in zip((first, *pruned, last), passes_of(summary, weights), strict=True):
        assert dict(zip(visits, each, strict=True)).keys() == set(visits)
        assert len(set(zip(visits, each, strict=True))) == len(set(visits))  # one weight for all visits of a sample
    assert max(weights) > 1
    assert ours.lrs[:PER_EPOCH] == host.lrs[:PER_EPOCH]
    starts = [i for i, batch in enumerate(ours.batch_idx) if batch == 0]
    assert [ours.lrs[i] for i in starts] == pytest.approx([host.lrs[PER_EPOCH * p] for p in range(4)], rel=1e-12)
    assert runner.param_schedulers[0]._global_step == len(host.lrs)


def test_weighted_visits_of_every_sample_add_up_to_one() -> None:
    """In expectation over the draws: what keeps pruned training unbiased."""
    trials, length = 2000, 40
    scores = torch.rand(length, generator=torch.Generator().manual_seed(0)) ** 2
    visits = np.zeros((trials, length))
    for seed in range(trials):
        pruner = Pruner(EpochSchedule(length, 10, 8), InfoBatchPolicy(0.5, 1.0), seed=seed)
        pruner.record(torch.arange(length), scores)
        walk = list(PlanSampler(pruner, repeats=REPEATS))
        weights = pruner.weights(torch.tensor(walk)).double().numpy()
        assert len(walk) < length and len(walk) % 8 == 0
        np.add.at(visits[seed], walk, weights)
    errors = visits.std(0) / math.sqrt(trials)
    assert 0 < errors.max() < 0.07
    assert (abs(visits.mean(0) - 1) < 4.5 * errors).all()
    # Of all samples together the error is far smaller.
    well_learned = (scores < scores.mean()).numpy()
    for part in (well_learned, ~well_learned):
        of_part = visits[:, part].mean(1)
        assert abs(of_part.mean() - 1) < 4.5 * of_part.std() / math.sqrt(trials) < 0.05


@pytest.mark.parametrize("kill", [pytest.param(4, marks=pytest.mark.slow), 13])
def test_a_resumed_run_goes_on_with_the_very_next_visit(tmp_path: Path, kill: int) -> None:
    """Between two visits of the same sample: the 32 of four batches are no multiple of three."""

    def cfg(name: str, **more: Any) -> Config:
        made = config(tmp_path / name, **OVERRIDES, **more)
        made.default_hooks.checkpoint.interval = kill
        return made

    straight_runner, straight = train(cfg("straight"))
    with pytest.raises(Killed):
        train(cfg("killed"), KillAt(kill + 1))
    resumed_runner, resumed = train(cfg("killed", resume=True))
    assert straight.indices[kill - 1][-1] == resumed.indices[0][0] == straight.indices[kill][0]
    assert resumed.indices == straight.indices[kill:]
    assert resumed.weights == straight.weights[kill:]
    assert resumed.lrs == straight.lrs[kill:]
    ours, theirs = resumed_runner.model.state_dict(), straight_runner.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_all_that_resnet_strikes_back_does_resumes_to_the_bit(tmp_path: Path) -> None:
    """Repeated augmentation, mixed batches, smoothed binary cross entropy and Lamb, as in its configs."""
    optim_wrapper = dict(
        _delete_=True,
        optimizer=dict(type="Lamb", lr=0.005, weight_decay=0.02),
        paramwise_cfg=dict(bias_decay_mult=0.0, norm_decay_mult=0.0),
    )
    loss = dict(SMOOTH, use_sigmoid=True)
    overrides = {"model.train_cfg": MIXING, "model.head.loss": loss, "optim_wrapper": optim_wrapper}
    assert_goes_on(tmp_path, 14, 12, **OVERRIDES, **overrides)


def test_repeats_of_a_fixed_part_of_the_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_repeats=3 with shuffle=False.*use shuffle=True"):
        train(config(tmp_path, **{**OVERRIDES, "train_dataloader.sampler.shuffle": False}))


def test_policy_none_keeps_the_hosts_repeats(tmp_path: Path) -> None:
    _, host = train(config(tmp_path / "host", custom_hooks=[], **OVERRIDES))
    hooks = [dict(type="InfoBatchHook", policy="none")]
    _, ours = train(config(tmp_path / "ours", custom_hooks=hooks, **OVERRIDES))
    assert ours.names == host.names
    assert ours.losses == host.losses
    assert_repeated(sum(ours.indices, [])[:N])


@pytest.mark.parametrize(("length", "world"), [(71, 2), (70, 4)])
def test_full_passes_that_do_not_divide_are_rounded_up_as_the_hosts(length: int, world: int) -> None:
    pruner = Pruner(EpochSchedule(length, 10, 8), InfoBatchPolicy())
    ours, host = Counter(), Counter()
    for rank in range(world):
        ours.update(PlanSampler(pruner, rank, world, repeats=REPEATS))
        sampler = RepeatAugSampler(range(length), seed=0, num_repeats=REPEATS)
        sampler.rank, sampler.world_size = rank, world
        sampler.num_samples = math.ceil(length * REPEATS / world)
        sampler.total_size = sampler.num_samples * world
        sampler.num_selected_samples = math.ceil(length / world)
        host.update(sampler)
    assert sorted(ours.values()) == sorted(host.values())


def know_the_toy(rank: int, runner: Any) -> None:
    """What is handed to the processes names this module, which registers the toy there."""


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(300)
def test_the_visits_of_a_sample_are_spread_over_the_ranks(tmp_path: Path) -> None:
    overrides = {**OVERRIDES, "train_dataloader.batch_size": B // 2}
    _, host = train(config(tmp_path / "host", custom_hooks=[], **OVERRIDES))
    run = Run(config(tmp_path / "ours", **overrides), 2, know_the_toy).finish()
    journals = [run.journal(rank) for rank in range(2)]
    pruned = 0
    for number in range(4):
        ranks = [[entry for entry in journal if entry["pass"] == number] for journal in journals]
        visits = [sum((entry["indices"] for entry in entries), []) for entries in ranks]
        weights = [sum((entry["weights"] for entry in entries), []) for entries in ranks]
        together = [visit for both in zip(*visits, strict=True) for visit in both]
        assert_repeated(together)
        assert len(set(visits[0]) ^ set(visits[1])) <= 1  # but the last one, whose row is shorter
        assert len(set(zip(sum(visits, []), sum(weights, []), strict=True))) == len(set(together))
        assert len(together) == N or len(together) % B == 0
        pruned += len(together) < N
        assert ranks[0][0]["lr"] == ranks[1][0]["lr"] == pytest.approx(host.lrs[PER_EPOCH * number], rel=1e-12)
    assert pruned == 2
