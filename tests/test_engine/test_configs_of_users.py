"""Configurations and hooks that users have, beyond the plain ones."""

from __future__ import annotations

import json
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS
from mmengine.runner import Runner
from torch.utils.data import BatchSampler, DataLoader

from infobatch_mm.core.score_file import read_scores
from infobatch_mm.engine.takeover import global_batch

from .test_resume import KillAt, Killed
from .toy import EPOCHS, ONE_LINE, Recorder, config, train

N = 22


def scores_of(runner: Runner) -> Any:
    return read_scores(runner.work_dir)


def test_without_shuffle_an_iteration_loop_leaves_out_a_random_remainder(scenes: Path, tmp_path: Path) -> None:
    hooks = [dict(type="InfoBatchHook", prune_ratio=0.0)]
    runner, recorder = train(
        config(scenes, tmp_path, custom_hooks=hooks, **{"train_dataloader.sampler.shuffle": False})
    )
    assert all(batch == sorted(batch) for batch in recorder.indices)
    assert scores_of(runner)["times_seen"].min() > 0


@pytest.mark.parametrize("val_begin", [pytest.param(1, marks=pytest.mark.slow), 30])
def test_the_last_iteration_is_validated_wherever_validation_begins(
    scenes: Path, tmp_path: Path, val_begin: int
) -> None:
    overrides = {"train_cfg.val_begin": val_begin, "train_cfg.val_interval": 7}
    runner, _ = train(config(scenes, tmp_path, **overrides))
    assert runner.iter < 30
    assert "val/mIoU" in runner.message_hub.log_scalars


def test_dynamic_intervals_are_kept(scenes: Path, tmp_path: Path) -> None:
    validated = []

    class Note(Hook):
        def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
            validated.append(runner.iter)

    overrides = {"train_cfg.val_interval": 10, "train_cfg.dynamic_intervals": [(12, 3)]}
    runner, _ = train(config(scenes, tmp_path, **overrides), Note())
    assert validated == sorted({10, *range(12, runner.iter, 3), runner.iter})


@pytest.mark.parametrize("policy", ["infobatch", "none"])
def test_a_plain_batch_sampler_is_followed(scenes: Path, tmp_path: Path, policy: str) -> None:
    DATA_SAMPLERS.register_module(name="BatchSampler", module=BatchSampler, force=True)
    cfg = config(scenes, tmp_path, **EPOCHS, custom_hooks=[dict(type="InfoBatchHook", policy=policy)])
    cfg.train_dataloader.batch_sampler = dict(type="BatchSampler", drop_last=True)
    _, recorder = train(cfg)
    assert all(len(batch) == 4 for batch in recorder.indices)
    assert recorder.indices[0] != [0, 1, 2, 3]


class Grouped:
    """Batches of two and of up to four in turn, as of a sampler that groups images by their shape; says no size."""

    def __init__(self, sampler: Any, batch_size: int = 4, for_ever: bool = False) -> None:
        self.sampler, self.most, self.for_ever = sampler, batch_size, for_ever

    def __iter__(self) -> Any:
        rest, sizes = list(islice(self.sampler, N)), cycle([2, self.most])
        for size in sizes:
            yield rest[:size]
            rest = rest[size:]
            if not rest and not self.for_ever:
                return
            rest = rest or list(range(N))


class GroupedWithLength(Grouped):
    def __len__(self) -> int:
        return 8


def test_without_pruning_a_batch_sampler_of_the_users_own_needs_no_batch_size(scenes: Path, tmp_path: Path) -> None:
    DATA_SAMPLERS.register_module(name="GroupedWithLength", module=GroupedWithLength, force=True)
    watch = dict(custom_hooks=[dict(type="InfoBatchHook", policy="none")])
    cfg = config(scenes, tmp_path / "epochs", **EPOCHS, **watch)
    cfg.train_dataloader.batch_sampler = dict(type="GroupedWithLength")
    cfg.optim_wrapper.optimizer.lr = 1e-3  # batches of two do not bear more
    runner, recorder = train(cfg)
    assert [len(batch) for batch in recorder.indices] == [2, 4, 2, 4, 2, 4, 2, 2] * 6
    summary = json.loads(Path(runner.work_dir, "infobatch_summary.json").read_text())
    # however many batches an epoch has, it is a pass
    assert (summary["passes_done"], summary["visits"], summary["saved_ratio"]) == (6, 6 * N, 0)
    assert scores_of(runner)["times_seen"].tolist() == [6] * N

    cfg = config(scenes, tmp_path / "iterations", **watch, **{"train_cfg.max_iters": 11})
    cfg.train_dataloader.batch_sampler = dict(type="GroupedWithLength", for_ever=True)
    cfg.optim_wrapper.optimizer.lr = 1e-3
    runner, recorder = train(cfg)
    made = np.bincount(np.concatenate(recorder.indices), minlength=N)
    assert scores_of(runner)["times_seen"].tolist() == made.tolist()


def test_the_size_of_a_batch_is_found_where_there_is_one() -> None:
    runner = SimpleNamespace(cfg=dict(train_dataloader=dict(batch_size=3)))
    bare = SimpleNamespace(cfg={})
    order = list(range(N))
    assert global_batch(runner, DataLoader(order, 4)) == 4
    assert global_batch(runner, DataLoader(order, batch_sampler=Grouped(order))) == 3
    assert global_batch(bare, DataLoader(order, batch_sampler=GroupedWithLength(order))) == 3  # 22 in 8 batches
    with pytest.raises(ValueError, match="batch sampler Grouped does not say how many samples a batch holds"):
        global_batch(bare, DataLoader(order, batch_sampler=Grouped(order)))


@pytest.mark.parametrize("policy", ["infobatch", pytest.param("none", marks=pytest.mark.slow)])
def test_the_default_dtype_of_a_script_is_not_ours(scenes: Path, tmp_path: Path, policy: str) -> None:
    """Scores, weights and the state are float32, whatever the model's own default is."""

    class Note(Hook):
        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            hook = next(hook for hook in runner.hooks if type(hook).__name__ == "InfoBatchHook")
            dtypes.update({hook._pruner.store.values.dtype, *weights_of(hook)})

    def weights_of(hook: Any) -> list[torch.dtype]:
        return [] if hook._pruner.plan is None else [hook._pruner.plan.weights.dtype]

    dtypes: set[torch.dtype] = set()
    torch.set_default_dtype(torch.float64)
    try:
        cfg = config(scenes, tmp_path, custom_hooks=[dict(ONE_LINE[0], policy=policy)])
        cfg.model.data_preprocessor.mean = cfg.model.data_preprocessor.std = None
        cfg.default_hooks.checkpoint.interval = 8
        runner = Runner.from_cfg(cfg)
        runner.register_hook(Note())
        runner.register_hook(recorder := Recorder())
        runner.model.float()
        runner.train()
    finally:
        torch.set_default_dtype(torch.float32)
    assert dtypes == {torch.float32}
    assert recorder.losses
    state = torch.load(Path(tmp_path, "iter_8.pth"), weights_only=False)["infobatch"]["pruner"]
    assert state["scores"].dtype == torch.float32
    assert scores_of(runner)["score"].dtype == np.float32


def test_the_samplers_own_seed_counts(scenes: Path, tmp_path: Path) -> None:
    plans = []
    for seed in (1, 2):
        sampler = dict(_delete_=True, type="InfoBatchSampler", seed=seed)
        _, recorder = train(config(scenes, tmp_path / str(seed), **{"train_dataloader.sampler": sampler}))
        plans.append(recorder.indices)
    assert plans[0] != plans[1]


def test_a_hook_that_walks_the_loader_does_not_disturb_the_scores(scenes: Path, tmp_path: Path) -> None:
    class Walk(Hook):
        priority = "NORMAL"

        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            if batch_idx == 4:
                for _ in runner.train_dataloader:
                    pass

    runner, recorder = train(config(scenes, tmp_path, **{"train_cfg.max_iters": 17}), Walk())
    seen = np.bincount(np.concatenate(recorder.indices), minlength=N)
    assert scores_of(runner)["times_seen"].tolist() == seen.tolist()


def test_a_data_set_may_have_an_attribute_called_dataset(scenes: Path, tmp_path: Path) -> None:
    from mmseg.registry import DATASETS, TRANSFORMS

    @DATASETS.register_module(name="NamedScenes", force=True)
    class NamedScenes(DATASETS.get("ADE20KDataset")):  # type: ignore[misc]
        dataset = "ade20k"

        def __init__(self, **kwargs: Any) -> None:
            self.dataset = "ade20k"
            super().__init__(**kwargs)

    @TRANSFORMS.register_module(name="DropSceneSix", force=True)
    class DropSceneSix:
        def __call__(self, results: dict) -> dict | None:
            return None if results["img_path"].endswith("00006.jpg") else results

    cfg = config(scenes, tmp_path)
    cfg.train_dataloader.dataset.type = "NamedScenes"
    cfg.train_dataloader.dataset.pipeline.insert(1, dict(type="DropSceneSix"))
    runner, _ = train(cfg)
    assert scores_of(runner)["times_seen"][6] == 0


@pytest.mark.parametrize("policy", ["infobatch", "none"])
def test_a_trained_runner_can_validate_and_test(scenes: Path, tmp_path: Path, policy: str) -> None:
    cfg = config(scenes, tmp_path, custom_hooks=[dict(type="InfoBatchHook", policy=policy)])
    cfg.test_dataloader, cfg.test_evaluator, cfg.test_cfg = cfg.val_dataloader, cfg.val_evaluator, dict(type="TestLoop")
    runner, recorder = train(cfg)
    done = runner.iter
    assert "mIoU" in runner.val()
    assert "mIoU" in runner.test()
    runner.train()  # as in the host: nothing is left to do
    assert runner.iter == done == len(recorder.losses)


def test_an_interrupted_training_goes_on_in_the_same_process(scenes: Path, tmp_path: Path) -> None:
    class InterruptOnce(Hook):
        done = False

        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            if runner.iter == 9 and not self.done:
                self.done = True
                raise KeyboardInterrupt

    runner = Runner.from_cfg(config(scenes, tmp_path))
    runner.register_hook(InterruptOnce(), priority="LOWEST")
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    runner.train()
    summary = json.loads(Path(runner.work_dir, "infobatch_summary.json").read_text())
    assert summary["passes_done"] == 6


def test_resuming_a_runner_by_hand(scenes: Path, tmp_path: Path) -> None:
    cfg = config(scenes, tmp_path / "straight")
    cfg.default_hooks.checkpoint.interval = 16
    straight_runner, straight = train(cfg)
    runner = Runner.from_cfg(config(scenes, tmp_path / "resumed"))
    runner.register_hook(recorder := Recorder())
    runner.resume(str(Path(straight_runner.work_dir, "iter_16.pth")))
    runner.train()
    # the host initialises the weights anew here, so losses and later plans are others
    assert recorder.indices[0] == straight.indices[16]
    assert recorder.lrs[0] == straight.lrs[16]
    summary = json.loads(Path(runner.work_dir, "infobatch_summary.json").read_text())
    assert (summary["passes_done"], summary["iterations"]) == (6, runner.iter)


@pytest.mark.parametrize(
    ("loop", "batch_size"),
    [
        ("iter", 8),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("iter", 2), ("epoch", 2), ("epoch", 8))),
    ],
)
def test_resuming_with_another_batch_size_keeps_scores_and_progress(
    scenes: Path, tmp_path: Path, loop: str, batch_size: int
) -> None:
    overrides = dict(EPOCHS) if loop == "epoch" else {}
    cfg = config(scenes, tmp_path, **overrides)
    cfg.default_hooks.checkpoint.interval = 13
    runner, straight = train(cfg)
    saved = torch.load(Path(runner.work_dir, "iter_13.pth"), weights_only=False)["infobatch"]
    steps = saved["scheduler_steps"]
    Path(runner.work_dir, "last_checkpoint").write_text(str(Path(runner.work_dir, "iter_13.pth")))
    overrides["train_dataloader.batch_size"] = batch_size
    runner, resumed = train(config(scenes, tmp_path, resume=True, log_level="INFO", **overrides))
    assert "drawn anew" in next(Path(runner.log_dir).glob("*.log")).read_text()
    assert runner.iter == runner.max_iters
    assert resumed.lrs[0] == pytest.approx(straight.lrs[13])
    pruned = [w for w, batch in zip(resumed.weights, resumed.indices, strict=True) if len(batch) == batch_size]
    assert any(weight > 1 for weights in pruned for weight in weights)
    if loop == "iter":
        assert all(len(batch) == batch_size for batch in resumed.indices)
        assert all(scheduler.last_step == 32 for scheduler in runner.param_schedulers)
        full = (33 - steps) * batch_size
        assert 0.5 * full < sum(map(len, resumed.indices)) <= full + batch_size


def test_optimiser_wrapper_dicts_and_scheduler_dicts(scenes: Path, tmp_path: Path) -> None:
    from mmengine.optim import OptimWrapper, OptimWrapperDict
    from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS
    from mmseg.models import EncoderDecoder
    from mmseg.registry import MODELS

    @OPTIM_WRAPPER_CONSTRUCTORS.register_module(name="TwoParts", force=True)
    class TwoParts:
        def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: Any = None) -> None:
            self.optimizer = optim_wrapper_cfg["optimizer"]

        def __call__(self, model: Any) -> OptimWrapperDict:
            parts = {"backbone": model.backbone, "head": model.decode_head}
            return OptimWrapperDict(
                **{
                    name: OptimWrapper(
                        OPTIMIZERS.build({**self.optimizer, "params": list(part.parameters())}), accumulative_counts=2
                    )
                    for name, part in parts.items()
                }
            )

    @MODELS.register_module(name="TwoOptimisers", force=True)
    class TwoOptimisers(EncoderDecoder):
        def train_step(self, data: Any, optim_wrapper: Any) -> dict:
            data = self.data_preprocessor(data, True)
            loss, log = self.parse_losses(self._run_forward(data, mode="loss"))
            for i, wrapper in enumerate(optim_wrapper.values()):
                wrapper.backward(wrapper.scale_loss(loss), retain_graph=i == 0)
            for wrapper in optim_wrapper.values():
                if wrapper.should_update():
                    wrapper.step()
                    wrapper.zero_grad()
            return log

    poly = dict(type="PolyLR", power=0.9, eta_min=1e-4, by_epoch=False, begin=0, end=33)

    def cfg(name: str, **overrides: Any) -> Any:
        made = config(scenes, tmp_path / name, custom_hooks=ONE_LINE, **{"model.type": "TwoOptimisers"}, **overrides)
        made.optim_wrapper = dict(constructor="TwoParts", optimizer=dict(type="SGD", lr=0.1, momentum=0.9))
        made.param_scheduler = dict(backbone=[poly], head=[poly])
        made.default_hooks.checkpoint.interval = 5
        return made

    with pytest.raises(Killed):
        train(cfg("killed"), KillAt(7))
    _, resumed = train(cfg("killed", resume=True))
    runner, recorder = train(cfg("straight"))
    assert resumed.losses == recorder.losses[5:]
    assert len(recorder.losses) == runner.iter == runner.max_iters
    for name, wrapper in runner.optim_wrapper.items():
        assert wrapper._max_counts == runner.max_iters
        assert runner.param_schedulers[name][0].last_step == 32
