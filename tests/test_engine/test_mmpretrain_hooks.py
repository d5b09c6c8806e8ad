"""Beside MMPretrain's own hooks, which walk our loader and exchange what we weigh."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmpretrain")

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from infobatch_mm.losses.views import LossView

from .processes import Run, assert_equal_parameters, final_state
from .test_mmpretrain_runs import (
    REPEATED,
    SMOOTH,
    assert_goes_on,
    assert_policy_none_is_the_host,
    books,
    of_pairs,
    scores,
    validated,
)
from .toy_classifier import EPOCHS, MIXING, ONE_LINE, PER_EPOCH, PIPELINE, Gradients, N, config, train

NO_FLIP = {"train_dataloader.dataset.pipeline": [PIPELINE[0], PIPELINE[2]]}
ITERATIONS = {
    "train_cfg": dict(_delete_=True, type="IterBasedTrainLoop", max_iters=EPOCHS * PER_EPOCH, val_interval=1000),
    "train_dataloader.sampler.type": "InfiniteSampler",
    "param_scheduler": [dict(type="CosineAnnealingLR", by_epoch=False)],
    "log_processor": dict(by_epoch=False),
}


def test_policy_none_changes_nothing_beside_them(tmp_path: Path) -> None:
    switch = switching()["custom_hooks"][-1]
    hooks = [dict(type="EMAHook"), PRECISE["epoch"], dict(type="ClassNumCheckHook"), switch]
    assert_policy_none_is_the_host(tmp_path, N, hooks, **SOFT)


# ---- averages of the model --------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", ["NORMAL", pytest.param("LOW", marks=pytest.mark.slow)])
def test_ema_follows_the_trained_parameters(tmp_path: Path, priority: str) -> None:
    """It copies the model before our views are attached, and after."""

    class Average(Hook):
        """The moving average by the book."""

        priority = "LOWEST"

        def __init__(self) -> None:
            self.ema: dict[str, torch.Tensor] = {}

        def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
            state = {key: value.detach().clone() for key, value in runner.model.named_parameters()}
            self.ema = {key: torch.lerp(self.ema.get(key, state[key]), state[key], 0.1) for key in state}

    hooks = [dict(type="EMAHook", momentum=0.1, evaluate_on_origin=True, priority=priority), *ONE_LINE]
    average = Average()
    runner, recorder = train(config(tmp_path, custom_hooks=hooks, **{"train_cfg.val_interval": 1}), average)
    assert len(recorder.losses) < EPOCHS * PER_EPOCH
    copied = ema_of(runner)
    for key, value in copied.named_parameters():
        assert torch.allclose(value, average.ema[key], rtol=1e-4, atol=1e-6)
    attributes = [value for module in copied.modules() for value in vars(module).values()]
    assert not any(isinstance(value, LossView) for value in attributes)
    assert len(validated(runner)) == len(validated(runner, "accuracy/top1_origin")) == EPOCHS


def ema_of(runner: Runner) -> torch.nn.Module:
    return next(hook for hook in runner.hooks if hasattr(hook, "ema_model")).ema_model.module


def test_ema_resumes_to_the_bit(tmp_path: Path) -> None:
    hooks = [dict(type="EMAHook", momentum=0.1), *ONE_LINE]
    resumed, straight = assert_goes_on(tmp_path, 14, 12, custom_hooks=hooks)
    ours, theirs = ema_of(resumed).state_dict(), ema_of(straight).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


PRECISE = {"epoch": dict(type="PreciseBNHook", num_samples=64), "iter": dict(type="PreciseBNHook", interval=4)}


@pytest.mark.parametrize("loop", PRECISE)
def test_precise_bn_walks_the_loader_and_leaves_no_trace(tmp_path: Path, loop: str) -> None:
    """After every epoch, or in the middle of passes; nothing is drawn at random there without flips."""
    overrides = {**NO_FLIP, **(ITERATIONS if loop == "iter" else {})}
    plain_runner, plain = train(config(tmp_path / "plain", **overrides))
    hooks = [PRECISE[loop], *ONE_LINE]
    runner, precise = train(config(tmp_path / "precise", custom_hooks=hooks, **overrides))
    assert precise.indices == plain.indices
    assert precise.weights == plain.weights
    assert precise.losses == plain.losses
    assert precise.max_iters == plain.max_iters
    for key in ("score", "times_seen"):
        assert scores(tmp_path / "precise")[key].tolist() == scores(tmp_path / "plain")[key].tolist()
    key = "backbone.layers.1.running_mean"
    assert not torch.equal(runner.model.state_dict()[key], plain_runner.model.state_dict()[key])


def test_precise_bn_sees_whole_passes_in_an_iteration_loop(tmp_path: Path) -> None:
    """Its average is over as many batches as the loader says it has, wherever in the pass it looks."""

    class Variances(Hook):
        priority = "LOWEST"

        def __init__(self) -> None:
            self.seen: list[float] = []

        def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
            self.seen.append(float(runner.model.backbone.layers[1].running_var.mean()))

    still = {**ITERATIONS, "optim_wrapper.optimizer": dict(_delete_=True, type="SGD", lr=0.0)}
    variances = Variances()
    train(config(tmp_path, custom_hooks=[dict(type="PreciseBNHook", interval=1), *ONE_LINE], **still), variances)
    assert min(variances.seen) > 0.8 * statistics.median(variances.seen)


@pytest.mark.parametrize(
    "loop", [next(iter(PRECISE)), *(pytest.param(each, marks=pytest.mark.slow) for each in list(PRECISE)[1:])]
)
def test_precise_bn_resumes_to_the_bit(tmp_path: Path, loop: str) -> None:
    overrides = ITERATIONS if loop == "iter" else {}
    assert_goes_on(tmp_path, 14, 12, custom_hooks=[PRECISE[loop], *ONE_LINE], **overrides)


# ---- another recipe ---------------------------------------------------------------------------------------

SOFT = {
    "model.data_preprocessor.to_onehot": True,  # the host mixes nothing without, and then needs a soft loss
    "model.head.loss": dict(type="CrossEntropyLoss", use_soft=True),
}
LARGER = [dict(type="DrawToyImage", size=16), dict(type="RandomFlip", prob=0.5), PIPELINE[2]]


def switching(**hook: Any) -> dict[str, Any]:
    """Both passes that are pruned begin with another recipe."""
    schedule = [
        dict(action_epoch=2, batch_augments=MIXING, loss=SMOOTH, train_pipeline=LARGER),
        dict(action_epoch=3, batch_augments=None),
    ]
    return {**SOFT, "custom_hooks": [*ONE_LINE, dict(type="SwitchRecipeHook", schedule=schedule, **hook)]}


def test_gradients_are_weighed_after_every_switch_of_the_recipe(tmp_path: Path) -> None:
    gradients = Gradients(smoothing=0.1, smoothed_from=1)
    runner, recorder = train(config(tmp_path, N, **switching()), gradients)
    steps = zip(gradients.weights, gradients.targets, gradients.plans, recorder.indices, strict=True)
    for weights, targets, plan, indices in steps:
        assert torch.allclose(weights, of_pairs(plan, indices, targets), rtol=1e-3)
    mixed = [int((targets > 0).sum(1).max()) for targets in gradients.targets]
    heaviest = [float(weights.max()) for weights in gradients.weights]
    for epoch, most in enumerate((1, 2, 1, 1)):
        iterations = [i for i, each in enumerate(gradients.epochs) if each == epoch]
        assert max(mixed[i] for i in iterations) == most
        assert (max(heaviest[i] for i in iterations) > 1.1) == (epoch in (1, 2))
    assert not any(isinstance(value, LossView) for module in runner.model.modules() for value in vars(module).values())


@pytest.mark.parametrize(
    ("kill", "interval"),
    [pytest.param(14, 12, id="mixed"), pytest.param(20, 19, id="after both", marks=pytest.mark.slow)],
)
def test_a_switched_recipe_resumes_to_the_bit(tmp_path: Path, kill: int, interval: int) -> None:
    assert_goes_on(tmp_path, kill, interval, N, **switching())


def test_a_switched_pipeline_reaches_persistent_workers(tmp_path: Path) -> None:
    workers = {"train_dataloader.num_workers": 1, "train_dataloader.persistent_workers": True}
    _, recorder = train(config(tmp_path, **switching(), **workers))
    size = [total / len(names) for total, names in zip(recorder.inputs, recorder.names, strict=True)]
    assert 2 * max(size[:PER_EPOCH]) < min(size[PER_EPOCH:])
    assert [entry["kept"] < N for entry in books(tmp_path)["per_pass"]] == [False, True, True, False]
    assert scores(tmp_path)["times_seen"].sum() == sum(map(len, recorder.indices))


def know_the_toy(rank: int, runner: Any) -> None:
    """What is handed to the processes names this module, which registers the toy there."""


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(300)
def test_two_ranks_with_all_of_them_resume_to_the_bit(tmp_path: Path) -> None:
    def cfg(name: str, **more: Any) -> Config:
        batch = {"train_dataloader.batch_size": 4, "train_cfg.val_interval": 1}
        made = config(tmp_path / name, **switching(), **REPEATED, **batch, **more)
        del made.custom_hooks[-1].schedule[0]["loss"]  # the host itself cannot exchange it under DDP
        made.custom_hooks[0].item_seed = True
        made.custom_hooks += [dict(type="EMAHook"), PRECISE["epoch"]]
        made.default_hooks.checkpoint.update(interval=12, save_last=True)
        return made

    straight = Run(cfg("straight"), 2, know_the_toy).finish()
    killed = Run(cfg("resumed"), 2, know_the_toy)
    assert killed.kill_after(14) == [-9, -9]
    resumed = Run(cfg("resumed", resume=True), 2, know_the_toy).finish()
    for rank in range(2):
        whole = straight.journal(rank)
        assert any(weight > 1 for entry in whole for weight in entry["weights"])
        assert resumed.journal(rank) == whole[12:]
    assert_equal_parameters(final_state(tmp_path / "resumed"), final_state(tmp_path / "straight"))


def test_mixed_images_are_weighed_by_their_pairs_whenever_the_recipe_is_switched(tmp_path: Path) -> None:
    gradients = Gradients()
    switch = dict(type="SwitchRecipeHook", priority="LOW", schedule=[dict(action_epoch=2, batch_augments=MIXING)])
    _, recorder = train(config(tmp_path, N, custom_hooks=[*ONE_LINE, switch], **SOFT), gradients)
    steps = zip(gradients.weights, gradients.targets, gradients.plans, recorder.indices, strict=True)
    for weights, targets, plan, indices in steps:
        assert torch.allclose(weights, of_pairs(plan, indices, targets), rtol=1e-3)
