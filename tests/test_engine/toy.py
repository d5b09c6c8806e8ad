"""A segmentor and runs of it that take a second."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

import infobatch_mm.engine  # noqa: F401

_COUNT = itertools.count()
ONE_LINE = [dict(type="InfoBatchHook", prune_ratio=0.5, delta=0.75)]
PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]


class Recorder(Hook):
    """What a run did: names, input sums, losses and learning rates of every iteration, and more."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.names: list[list[str]] = []
        self.inputs: list[float] = []
        self.pixels: list[float] = []  # depends on how images are flipped, unlike their sum
        self.losses: list[dict[str, float]] = []
        self.lrs: list[float] = []
        self.momenta: list[float] = []
        self.boundary_lrs: list[float] = []
        self.max_iters: list[int] = []
        self.weights: list[list[float]] = []
        self.indices: list[list[int]] = []
        self.batch_idx: list[int] = []

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.names.append([Path(sample.img_path).name for sample in data_batch["data_samples"]])
        self.inputs.append(sum(float(image.double().sum()) for image in data_batch["inputs"]))
        self.pixels.append(sum(float(image[:, :, :16].double().sum()) for image in data_batch["inputs"]))
        self.lrs.append(_first(runner.optim_wrapper.get_lr()))
        self.momenta.append(_first(runner.optim_wrapper.get_momentum()))
        self.max_iters.append(runner.max_iters)
        self.batch_idx.append(batch_idx)
        current = getattr(runner.train_dataloader, "current", None)
        if current is not None:
            self.indices.append(current.indices.tolist())
        for hook in runner.hooks:
            if type(hook).__name__ == "InfoBatchHook" and hook._pruner is not None and hook._pruner.plan is not None:
                self.weights.append(hook._pruner.weights(current.indices).tolist())

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.losses.append({key: float(value.detach()) for key, value in outputs.items()})

    def after_pass(self, runner: Any) -> None:
        self.boundary_lrs.append(_first(runner.optim_wrapper.get_lr()))


class Killed(Exception):
    pass


class KillAt(Hook):
    """Ends the process's training after an iteration, as late as a hook can."""

    priority = 100

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter + 1 == self.iteration:
            raise Killed


def _first(values: dict[str, list[float]]) -> float:
    return next(iter(values.values()))[0]


def config(root: Path, work_dir: Path, **overrides: Any) -> Config:
    """22 scenes in batches of 4; iteration loop of 33 iterations (6 passes) unless overridden."""
    norm = dict(type="BN", requires_grad=True)
    head = dict(
        type="FCNHead", channels=4, num_convs=1, concat_input=False, num_classes=30, norm_cfg=norm, dropout_ratio=0.1
    )
    dataset = dict(
        type="ADE20KDataset",
        data_root=str(root),
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=copy.deepcopy(PIPELINE),
    )
    val = copy.deepcopy(dataset)
    val["data_prefix"] = dict(img_path="images/validation", seg_map_path="annotations/validation")
    val["pipeline"].pop(2)
    val_loader = dict(batch_size=2, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False), dataset=val)
    cfg = Config(
        dict(
            default_scope="mmseg",
            work_dir=str(work_dir),
            experiment_name=f"toy{next(_COUNT)}",
            model=dict(
                type="EncoderDecoder",
                data_preprocessor=dict(
                    type="SegDataPreProcessor", size=(32, 32), mean=[120.0] * 3, std=[60.0] * 3, seg_pad_val=255
                ),
                backbone=dict(
                    type="ResNetV1c", depth=18, stem_channels=4, base_channels=4, norm_cfg=norm, num_stages=4
                ),
                decode_head=dict(head, in_channels=32, in_index=3),
                auxiliary_head=dict(
                    head, in_channels=16, in_index=2, loss_decode=dict(type="CrossEntropyLoss", loss_weight=0.4)
                ),
                train_cfg=dict(),
                test_cfg=dict(mode="whole"),
            ),
            train_dataloader=dict(
                batch_size=4, num_workers=0, sampler=dict(type="InfiniteSampler", shuffle=True), dataset=dataset
            ),
            val_dataloader=val_loader,
            val_evaluator=dict(type="IoUMetric", iou_metrics=["mIoU"]),
            val_cfg=dict(type="ValLoop"),
            train_cfg=dict(type="IterBasedTrainLoop", max_iters=33, val_interval=1000),
            optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1, momentum=0.9)),
            param_scheduler=[dict(type="PolyLR", power=0.9, eta_min=1e-4, by_epoch=False, begin=0, end=33)],
            default_hooks=dict(
                logger=dict(type="LoggerHook", interval=1000, log_metric_by_epoch=False),
                checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=-1, save_last=False),
            ),
            custom_hooks=copy.deepcopy(ONE_LINE),
            log_processor=dict(by_epoch=False),
            log_level="WARNING",
            randomness=dict(seed=3),
            env_cfg=dict(dist_cfg=dict(backend="gloo")),
        )
    )
    cfg.merge_from_dict(copy.deepcopy(overrides))
    return cfg


EPOCHS = {
    "train_cfg": dict(_delete_=True, type="EpochBasedTrainLoop", max_epochs=6, val_interval=1000),
    "train_dataloader.sampler.type": "DefaultSampler",
    "log_processor.by_epoch": True,
    "param_scheduler": [dict(type="PolyLR", power=0.9, eta_min=1e-4, by_epoch=True, begin=0, end=6)],
}


def train(cfg: Config, *hooks: Hook) -> tuple[Runner, Recorder]:
    """Train and record, with further hooks beside the config's."""
    threads = torch.get_num_threads()
    runner = Runner.from_cfg(cfg)
    recorder = Recorder()
    for hook in (recorder, *hooks):
        runner.register_hook(hook)
    try:
        runner.train()
    finally:
        torch.set_num_threads(threads)
        # Left to the garbage collector, persistent workers take seconds to end, in some later test.
        workers = getattr(runner.train_dataloader, "_iterator", None)
        if workers is not None:
            workers._shutdown_workers()
    return runner, recorder
