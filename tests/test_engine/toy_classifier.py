"""A classifier of MMPretrain and runs of it that take a fraction of a second."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS, MODELS, TRANSFORMS
from torch import Tensor, nn

from infobatch_mm.engine import InfoBatchHook

from . import toy

_COUNT = itertools.count()
ONE_LINE = [dict(type="InfoBatchHook", prune_ratio=0.5, delta=0.75)]
#: Samples, global batch, epochs.
N, B, EPOCHS = 70, 8, 4
#: The unpruned run's iterations in an epoch, the last of them of six samples.
PER_EPOCH = 9
PIPELINE = [dict(type="DrawToyImage"), dict(type="RandomFlip", prob=0.5), dict(type="PackInputs")]
#: Always one of the two.
MIXING = dict(augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)])


@functools.cache
def _picture(number: int, shape: tuple[int, ...]) -> np.ndarray:
    noise = np.random.default_rng(number).integers(0, 256, shape)
    return (0.5 * noise + 32 * (number % 4)).astype(np.uint8)


@TRANSFORMS.register_module(force=True)
class DrawToyImage:
    """Draws the picture that the number in ``img_path`` stands for; no file is read."""

    def __init__(self, size: int = 8, channels: int = 3) -> None:
        self.shape = (size, size, channels)

    def __call__(self, results: dict) -> dict:
        results["img"] = _picture(int(Path(results["img_path"]).stem), self.shape).copy()
        results["img_shape"] = results["ori_shape"] = self.shape[:2]
        return results


@DATASETS.register_module(force=True)
class ToyImages(BaseDataset):
    """``length`` pictures of ``num_classes`` classes in turn; as many classes as pictures give each its own."""

    def __init__(self, length: int = N, num_classes: int = 4, **kwargs: Any) -> None:
        self._length, self._num_classes = length, num_classes
        kwargs.setdefault("serialize_data", False)  # what it collects takes longer than the training
        super().__init__(ann_file="", metainfo=dict(classes=[str(i) for i in range(num_classes)]), **kwargs)

    def load_data_list(self) -> list[dict]:
        return [dict(img_path=f"{i:05d}.png", gt_label=i % self._num_classes) for i in range(self._length)]


@MODELS.register_module(force=True)
class OneConv(nn.Module):
    """The smallest backbone with a BatchNorm."""

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(in_channels, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.layers(images).mean((2, 3)),)


def config(work_dir: Path, classes: int = 4, **overrides: Any) -> Config:
    """70 pictures in batches of 8, in 4 epochs unless overridden."""
    dataset = dict(type="ToyImages", num_classes=classes, pipeline=copy.deepcopy(PIPELINE))
    test = dict(type="ToyImages", length=12, num_classes=classes, pipeline=[PIPELINE[0], PIPELINE[2]], test_mode=True)
    loader = dict(batch_size=4, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False), dataset=test)
    cfg = Config(
        dict(
            default_scope="mmpretrain",
            work_dir=str(work_dir),
            experiment_name=f"toy-classifier{next(_COUNT)}",
            model=dict(
                type="ImageClassifier",
                data_preprocessor=dict(mean=[120.0] * 3, std=[60.0] * 3, num_classes=classes),
                backbone=dict(type="OneConv"),
                head=dict(type="LinearClsHead", num_classes=classes, in_channels=8),
            ),
            train_dataloader=dict(
                batch_size=B, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=True), dataset=dataset
            ),
            train_cfg=dict(by_epoch=True, max_epochs=EPOCHS, val_interval=1000),
            val_dataloader=loader,
            val_evaluator=dict(type="Accuracy"),
            val_cfg=dict(),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9)),
            param_scheduler=[dict(type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True)],
            default_hooks=dict(
                logger=dict(type="LoggerHook", interval=1000),
                checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=-1, save_last=False),
            ),
            custom_hooks=copy.deepcopy(ONE_LINE),
            log_level="WARNING",
            randomness=dict(seed=3),
            env_cfg=dict(dist_cfg=dict(backend="gloo")),
        )
    )
    cfg.merge_from_dict(copy.deepcopy(overrides))
    return cfg


def train(cfg: Config, *hooks: Hook) -> tuple[Runner, toy.Recorder]:
    """As :func:`.toy.train`; formatting the config for the log would take as long as the training."""
    with mock.patch.object(Config, "pretty_text", ""):
        return toy.train(cfg, *hooks)


def hook_of(runner: Any) -> InfoBatchHook:
    return next(hook for hook in runner.hooks if isinstance(hook, InfoBatchHook))


class Gradients(Hook):
    """What each image of a batch was weighed by in truth, read off the gradient of its logits.

    For a cross entropy that gradient is (softmax - target) / B times the weight. Knows nothing of views.

    Args:
        smoothing (float): Of the loss's labels, from the epoch on that ``smoothed_from`` says.

    Attributes:
        weights (list[Tensor]): Of every iteration, shape (B,).
        targets (list[Tensor]): What the images are made of, shape (B, classes).
        plans (list[Plan]): The plan of every iteration.
        epochs (list[int]): The epoch of every iteration.
    """

    priority = "LOWEST"

    def __init__(self, smoothing: float = 0.0, smoothed_from: int = 0) -> None:
        self.weights: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.plans: list[Any] = []
        self.epochs: list[int] = []
        self._smoothing, self._from = smoothing, smoothed_from

    def before_train(self, runner: Any) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model.head.fc.register_forward_hook(self._keep_logits)
        model.data_preprocessor.register_forward_hook(self._keep_samples)

    def _keep_logits(self, module: nn.Module, inputs: Any, logits: Tensor) -> None:
        if logits.requires_grad:
            logits.retain_grad()
            self._logits = logits

    def _keep_samples(self, module: nn.Module, inputs: Any, batch: dict) -> None:
        self._samples = batch["data_samples"]

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.plans.append(hook_of(runner)._pruner.plan)  # type: ignore[union-attr]
        self.epochs.append(runner.epoch)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        logits = self._logits.detach()
        classes = logits.shape[1]
        targets = torch.stack(
            [
                sample.gt_score if "gt_score" in sample else torch.eye(classes)[int(sample.gt_label)]
                for sample in self._samples
            ]
        )
        smoothing = self._smoothing if runner.epoch >= self._from else 0.0
        smooth = (1 - smoothing) * targets + smoothing / classes
        alone = (logits.softmax(1) - smooth) / len(logits)
        grad = self._logits.grad
        weights = (grad * alone).sum(1) / alone.square().sum(1)
        assert torch.allclose(weights[:, None] * alone, grad, rtol=1e-3, atol=1e-6), "not a cross entropy's gradient"
        self.weights.append(weights)
        self.targets.append(targets)
