"""One clear error before training starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.registry import DATA_SAMPLERS, LOOPS
from mmengine.runner import IterBasedTrainLoop, Runner
from mmseg.registry import DATASETS
from torch.utils.data import BatchSampler, IterableDataset

from infobatch_mm.engine import InfoBatchHook

from .toy import EPOCHS, ONE_LINE, config, train


@DATASETS.register_module(force=True)
class StreamOfScenes(IterableDataset):
    def __iter__(self) -> Any:
        yield {}

    def __len__(self) -> int:
        return 22


@DATASETS.register_module(force=True)
class NoScenes:
    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Any:
        raise IndexError(index)


@DATA_SAMPLERS.register_module(force=True)
class OddBatchSampler(BatchSampler):
    def __init__(self, sampler: Any, batch_size: int) -> None:
        super().__init__(sampler, batch_size, drop_last=False)


@DATA_SAMPLERS.register_module(force=True)
class OddSampler(DefaultSampler):
    pass


@LOOPS.register_module(force=True)
class OddLoop(IterBasedTrainLoop):
    pass


def two_hooks(cfg: Config) -> None:
    cfg.custom_hooks = ONE_LINE * 2


def iterable(cfg: Config) -> None:
    cfg.train_dataloader.dataset = dict(type="StreamOfScenes")
    cfg.train_dataloader.pop("sampler")
    cfg.train_dataloader.sampler = None


def empty(cfg: Config) -> None:
    cfg.train_dataloader.dataset = dict(type="NoScenes")


def batch_sampler(cfg: Config) -> None:
    cfg.train_dataloader.batch_sampler = dict(type="OddBatchSampler")


def odd_sampler(cfg: Config) -> None:
    cfg.train_dataloader.sampler = dict(type="OddSampler")


def odd_loop(cfg: Config) -> None:
    cfg.train_cfg.type = "OddLoop"


def large_batch(cfg: Config) -> None:
    cfg.train_dataloader.batch_size = 23


def elementwise(cfg: Config) -> None:
    cfg.model.decode_head.loss_decode = dict(type="CrossEntropyLoss", reduction="none")


def contradiction(cfg: Config) -> None:
    cfg.train_dataloader.sampler = dict(type="InfoBatchSampler", prune_ratio=0.3)


def none_with_our_sampler(cfg: Config) -> None:
    cfg.train_dataloader.sampler = dict(type="InfoBatchSampler", policy="none")
    cfg.custom_hooks = [dict(type="InfoBatchHook")]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (two_hooks, "more than one InfoBatchHook"),
        (iterable, "iterable data set"),
        (empty, "empty"),
        (batch_sampler, "batch sampler OddBatchSampler"),
        (odd_sampler, "OddSampler"),
        (odd_loop, "OddLoop"),
        (large_batch, "23 samples.*22"),
        (elementwise, r"decode_head\.loss_decode \(CrossEntropyLoss of FCNHead\) has reduction='none'"),
        (contradiction, r"InfoBatchHook has prune_ratio=0\.5.*InfoBatchSampler has prune_ratio=0\.3"),
        (none_with_our_sampler, "policy='none'"),
    ],
)
def test_refused_before_training(scenes: Path, tmp_path: Path, spoil: Callable[[Config], None], message: str) -> None:
    cfg = config(scenes, tmp_path)
    spoil(cfg)
    runner = Runner.from_cfg(cfg)
    with pytest.raises(ValueError, match=message):
        runner.train()
    assert runner.iter == 0


@pytest.mark.parametrize(
    "arguments",
    [
        dict(prune_ratio=1.5),
        dict(prune_ratio=1.0),
        dict(prune_ratio=-0.1),
        dict(prune_ratio=float("nan")),
        dict(delta=0.0),
        dict(delta=1.2),
        dict(policy="unknown"),
    ],
)
def test_arguments_out_of_range_are_refused_with_their_value(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
        InfoBatchHook(**arguments)


def test_epoch_loop_without_a_batch_is_refused(scenes: Path, tmp_path: Path) -> None:
    cfg = config(scenes, tmp_path, **EPOCHS)
    cfg.train_dataloader.batch_size = 30
    cfg.train_dataloader.drop_last = True
    with pytest.raises(ValueError, match="no batch"):
        train(cfg)


def test_a_config_without_train_loop_is_one_clear_error(scenes: Path, tmp_path: Path) -> None:
    cfg = config(scenes, tmp_path)
    for key in ("train_cfg", "train_dataloader", "optim_wrapper", "param_scheduler"):
        cfg.pop(key)
    runner = Runner.from_cfg(cfg)
    with pytest.raises(RuntimeError, match="train_loop"):
        runner.train()


def test_validation_and_test_ignore_the_hook(scenes: Path, tmp_path: Path) -> None:
    cfg = config(scenes, tmp_path)
    cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    cfg.test_cfg = dict(type="TestLoop")
    runner = Runner.from_cfg(cfg)
    assert "mIoU" in runner.val()
    assert "mIoU" in runner.test()


def test_unbound_sampler_says_what_it_needs(scenes: Path, tmp_path: Path) -> None:
    cfg = config(scenes, tmp_path, custom_hooks=[])
    cfg.train_dataloader.sampler = dict(type="InfoBatchSampler")
    with pytest.raises(ValueError, match="InfoBatchHook"):
        train(cfg)
