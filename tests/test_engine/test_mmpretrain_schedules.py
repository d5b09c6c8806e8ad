"""Every schedule that MMPretrain ships: a pruned run's rates are the unpruned run's at the end of every pass."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmpretrain")

import mmpretrain
from mmengine.config import Config
from mmengine.hooks import Hook

from .test_resume import KillAt, Killed
from .toy_classifier import PER_EPOCH, PIPELINE, config, train

SCHEDULES = sorted(Path(mmpretrain.__file__).parent.glob(".mim/configs/_base_/schedules/*.py"))
IMAGENET = 1281167
EPOCHS = 6
#: A batch of four makes as many iterations of fewer pictures.
SMALL = {
    "train_cfg.max_epochs": EPOCHS,
    "train_dataloader.batch_size": 4,
    "train_dataloader.dataset.length": 34,
    "train_dataloader.dataset.pipeline": [PIPELINE[0], PIPELINE[2]],
}
HOOK = [dict(type="InfoBatchHook", prune_ratio=0.5, delta=0.9)]


class Rates(Hook):
    """Learning rates, weight decays and momenta of all groups, and steps of all schedulers."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.at_epoch_ends: list[list[dict[str, float]]] = []
        self.steps: list[list[int]] = []  # after every iteration
        self.batches: list[tuple[int, int, int]] = []  # epoch, batch, and how many the epoch has

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.steps.append([scheduler._global_step for scheduler in runner.param_schedulers])
        self.batches.append((runner.epoch, batch_idx, len(runner.train_dataloader)))

    def after_train_epoch(self, runner: Any) -> None:
        self.at_epoch_ends.append(
            [
                {key: value for key, value in group.items() if key in ("lr", "weight_decay", "momentum")}
                for group in runner.optim_wrapper.param_groups
            ]
        )


def scaled(schedule: Config) -> dict[str, Any]:
    """A schedule in six epochs: everything in proportion, and at least one of them apart."""
    shrink = EPOCHS / schedule.train_cfg.max_epochs

    def epoch(value: float) -> int:
        # A warm-up goes on in the second epoch, the first that is pruned.
        return max(2, round(value * shrink)) if value else 0

    def iteration(value: float) -> int:
        of_epoch = math.ceil(IMAGENET / schedule.auto_scale_lr.base_batch_size)
        return max(PER_EPOCH + 4, round(value / of_epoch * shrink * PER_EPOCH)) if value else 0

    schedulers = schedule.param_scheduler
    schedulers = [schedulers] if isinstance(schedulers, dict) else schedulers
    made = []
    for scheduler in (dict(scheduler) for scheduler in schedulers):
        position = epoch if scheduler["by_epoch"] else iteration
        if "T_max" in scheduler:
            assert scheduler["T_max"] == scheduler["end"] - scheduler["begin"]
            scheduler["T_max"] = position(scheduler["end"]) - position(scheduler["begin"])
        for key in scheduler.keys() & {"begin", "end"}:
            scheduler[key] = position(scheduler[key])
        if "milestones" in scheduler:
            scheduler["milestones"] = [round(milestone * shrink) for milestone in scheduler["milestones"]]
        made.append(scheduler)
    optim_wrapper = dict(schedule.optim_wrapper, _delete_=True)
    return {"optim_wrapper": optim_wrapper, "param_scheduler": made}


def both(work_dir: Path, **overrides: Any) -> tuple[Any, Rates, Any, Rates]:
    """Runner and rates of the unpruned run, and of the pruned one."""
    made: list[Any] = []
    for name, custom_hooks in (("host", []), ("ours", HOOK)):
        rates = Rates()
        runner, _ = train(config(work_dir / name, custom_hooks=custom_hooks, **SMALL, **overrides), rates)
        made += [runner, rates]
    return tuple(made)


def assert_equal_rates(ours: Rates, host: Rates, changing: str = "lr") -> None:
    assert len(ours.at_epoch_ends) == len(host.at_epoch_ends) == EPOCHS
    for our_groups, host_groups in zip(ours.at_epoch_ends, host.at_epoch_ends, strict=True):
        assert our_groups == [pytest.approx(group, rel=1e-12, abs=0) for group in host_groups]
    assert len({groups[0][changing] for groups in host.at_epoch_ends}) > 1


def assert_steps_of_the_host(ours: Rates, host: Rates, schedulers: list[Any]) -> None:
    assert len(ours.steps) < 0.9 * len(host.steps)
    assert ours.steps[-1] == host.steps[-1]
    for number, scheduler in enumerate(schedulers):
        taken = [steps[number] for steps in ours.steps]
        assert all(before <= after for before, after in pairwise(taken))
        for (epoch, batch, batches), steps in zip(ours.batches, taken, strict=True):
            even = epoch if scheduler.by_epoch else PER_EPOCH * (epoch + (batch + 1) / batches)
            assert even - 1 < steps <= even + 1e-9


def one_of_each_kind() -> set[Path]:
    """The first of the schedules whose schedulers are of the same kinds: the others differ in numbers."""
    found: dict[tuple, Path] = {}
    for path in SCHEDULES:
        schedulers = Config.fromfile(path).param_scheduler
        schedulers = [schedulers] if isinstance(schedulers, dict) else schedulers
        kinds = [(each.type, each.by_epoch, each.get("convert_to_iter_based", False)) for each in schedulers]
        found.setdefault(tuple(kinds), path)
    return set(found.values())


SHORT = one_of_each_kind()


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[] if path in SHORT else pytest.mark.slow) for path in SCHEDULES],
)
def test_rates_of_every_shipped_schedule_are_the_hosts(tmp_path: Path, path: Path) -> None:
    host_runner, host, runner, ours = both(tmp_path, **scaled(Config.fromfile(path)))
    assert_equal_rates(ours, host)
    assert_steps_of_the_host(ours, host, runner.param_schedulers)
    last = [(s._global_step, s.last_step) for s in runner.param_schedulers]
    assert last == [(s._global_step, s.last_step) for s in host_runner.param_schedulers]


def test_the_schedules_were_found() -> None:
    assert len(SCHEDULES) >= 20 and len(SHORT) >= 4


WARM_UP = dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=3, convert_to_iter_based=True)
TO_THE_END = dict(by_epoch=True, begin=3, end=EPOCHS, convert_to_iter_based=True)


def test_layers_keep_the_distance_of_their_rates(tmp_path: Path) -> None:
    overrides = {
        "model.backbone": dict(
            _delete_=True,
            type="VisionTransformer",
            arch=dict(embed_dims=8, num_layers=2, num_heads=2, feedforward_channels=8),
            img_size=8,
            patch_size=4,
        ),
        "optim_wrapper": dict(
            _delete_=True,
            constructor="LearningRateDecayOptimWrapperConstructor",
            optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
            paramwise_cfg=dict(layer_decay_rate=0.5, flat_decay_mult=0.0),
        ),
        "param_scheduler": [WARM_UP, dict(type="CosineAnnealingLR", eta_min=1e-6, **TO_THE_END)],
    }
    _, host, runner, ours = both(tmp_path, **overrides)
    assert_equal_rates(ours, host)
    assert_steps_of_the_host(ours, host, runner.param_schedulers)
    warm = ours.at_epoch_ends[1]  # in the warm-up they are all in proportion
    assert {round(group["lr"] / warm[-1]["lr"], 6) for group in warm} == {0.125, 0.25, 0.5, 1.0}


def test_a_schedule_of_weight_decay_and_momentum_is_the_hosts(tmp_path: Path) -> None:
    """By iteration, as in SparK's configs: in pruned passes it takes several steps at once."""
    whole = {**TO_THE_END, "begin": 0}
    schedulers = [
        WARM_UP,
        dict(type="CosineAnnealingWeightDecay", eta_min=0.2, T_max=EPOCHS, **whole),
        dict(type="LinearMomentum", start_factor=0.5, **whole),
    ]
    optimizer = dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=0.04)
    _, host, runner, ours = both(tmp_path, **{"param_scheduler": schedulers, "optim_wrapper.optimizer": optimizer})
    for changing in ("lr", "weight_decay", "momentum"):
        assert_equal_rates(ours, host, changing)
    assert_steps_of_the_host(ours, host, runner.param_schedulers)


def test_a_run_that_resumes_in_a_warm_up_goes_on_with_its_rates(tmp_path: Path) -> None:
    """Passes of 4 iterations, which take 9 steps: the number of iterations tells nothing of that of steps."""

    def cfg(name: str, **more: Any) -> Config:
        hooks = [dict(HOOK[0], policy="random")]
        schedulers = [WARM_UP, dict(type="CosineAnnealingLR", **TO_THE_END)]
        made = config(tmp_path / name, custom_hooks=hooks, param_scheduler=schedulers, **SMALL, **more)
        made.default_hooks.checkpoint.interval = 6
        return made

    straight_rates, resumed_rates = Rates(), Rates()
    _, straight = train(cfg("straight"), straight_rates)
    assert straight_rates.batches[5] == (1, 1, 4)
    assert straight_rates.steps[5] == [PER_EPOCH + PER_EPOCH // 2] * 2
    with pytest.raises(Killed):
        train(cfg("killed"), KillAt(8))
    _, resumed = train(cfg("killed", resume=True), resumed_rates)
    assert resumed.lrs == straight.lrs[6:]
    assert resumed_rates.steps == straight_rates.steps[6:]
