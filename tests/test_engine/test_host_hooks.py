"""Beside the hosts' own hooks and wrappers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS

from infobatch_mm.core.score_file import read_scores

from .toy import EPOCHS, ONE_LINE, config, train


@OPTIM_WRAPPERS.register_module(force=True)
class CountingOptimWrapper(OptimWrapper):
    """Notes at which inner count the parameters were updated, and whether gradients were left over."""

    updates: list[int]

    def step(self, **kwargs: Any) -> None:
        self.__dict__.setdefault("updates", []).append(self._inner_count)
        super().step(**kwargs)


@pytest.mark.parametrize("epochs", [False, True])
def test_gradient_accumulation_loses_no_gradient(scenes: Path, tmp_path: Path, epochs: bool) -> None:
    wrapper = dict(
        _delete_=True,
        type="CountingOptimWrapper",
        accumulative_counts=3,
        optimizer=dict(type="SGD", lr=0.1, momentum=0.9),
    )
    runner, _ = train(config(scenes, tmp_path, optim_wrapper=wrapper, **(EPOCHS if epochs else {})))
    updates = runner.optim_wrapper.updates
    assert updates[-1] == runner.iter
    assert updates[:-1] == list(range(3, runner.iter, 3))[: len(updates) - 1]


def test_ema_model_is_a_clean_copy_and_is_swapped_in(scenes: Path, tmp_path: Path) -> None:
    from mmseg.models.losses.cross_entropy_loss import cross_entropy

    seen = {}

    class Look(Hook):
        def before_train(self, runner: Any) -> None:
            ema = next(hook for hook in runner.hooks if type(hook).__name__ == "EMAHook")
            seen["criterion"] = ema.ema_model.module.decode_head.loss_decode.cls_criterion

    for position, hooks in enumerate(([dict(type="EMAHook"), *ONE_LINE], [*ONE_LINE, dict(type="EMAHook")])):
        cfg = config(scenes, tmp_path / str(position), custom_hooks=hooks)
        cfg.default_hooks.checkpoint.save_last = True
        runner, _ = train(cfg, Look())
        assert seen["criterion"] is cross_entropy
        checkpoint = torch.load(Path(runner.work_dir, f"iter_{runner.iter}.pth"), weights_only=False)
        assert "ema_state_dict" in checkpoint


def test_save_best_and_early_stopping(scenes: Path, tmp_path: Path) -> None:
    hooks = [*ONE_LINE, dict(type="EarlyStoppingHook", monitor="mIoU", rule="greater", patience=1, min_delta=1000.0)]
    cfg = config(scenes, tmp_path, custom_hooks=hooks, **{"train_cfg.val_interval": 5})
    cfg.default_hooks.checkpoint.save_best = "mIoU"
    runner, recorder = train(cfg)
    assert runner.train_loop.stop_training
    assert len(recorder.losses) == runner.iter < runner.max_iters
    assert list(Path(runner.work_dir).glob("best_mIoU_*.pth"))
    summary = json.loads(Path(runner.work_dir, "infobatch_summary.json").read_text())
    assert summary["iterations"] == runner.iter
    assert summary["visits"] == sum(map(len, recorder.indices))


def test_checkpoint_loads_with_weights_only(scenes: Path, tmp_path: Path) -> None:
    cfg = config(scenes, tmp_path)
    cfg.default_hooks.checkpoint.interval = 8
    runner, _ = train(cfg)
    state = torch.load(Path(runner.work_dir, "iter_8.pth"), weights_only=False)["infobatch"]
    torch.save(state, tmp_path / "state.pth")
    torch.load(tmp_path / "state.pth", weights_only=True)


def test_scalars_reach_the_visualizer(scenes: Path, tmp_path: Path) -> None:
    runner, _ = train(
        config(
            scenes,
            tmp_path,
            visualizer=dict(type="SegLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")], name="visualizer"),
        )
    )
    lines = [json.loads(line) for line in next(Path(runner.work_dir).rglob("scalars.json")).read_text().splitlines()]
    keys = {key for line in lines for key in line}
    told = "kept_ratio saved_ratio threshold score_mean worth cost efficiency limit"
    assert {f"infobatch/{name}" for name in told.split()} <= keys


def test_autocast_on_the_cpu(scenes: Path, tmp_path: Path) -> None:
    from mmseg.models import EncoderDecoder
    from mmseg.registry import MODELS

    @MODELS.register_module(name="AutocastSegmentor", force=True)
    class AutocastSegmentor(EncoderDecoder):
        def train_step(self, data: Any, optim_wrapper: Any) -> dict:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().train_step(data, optim_wrapper)

    runner, recorder = train(config(scenes, tmp_path, **{"model.type": "AutocastSegmentor"}))
    assert runner.iter == runner.max_iters
    assert all(torch.isfinite(torch.tensor(list(losses.values()))).all() for losses in recorder.losses)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_amp_optim_wrapper(scenes: Path, tmp_path: Path) -> None:
    runner, _ = train(config(scenes, tmp_path, **{"optim_wrapper.type": "AmpOptimWrapper"}))
    assert runner.iter == runner.max_iters


def test_a_nonfinite_loss_is_counted_and_not_recorded(scenes: Path, tmp_path: Path) -> None:
    from mmseg.registry import TRANSFORMS

    @TRANSFORMS.register_module(name="BreakSceneSeven", force=True)
    class BreakSceneSeven:
        def __call__(self, results: dict) -> dict:
            if results["img_path"].endswith("00007.jpg"):
                results["img"] = results["img"].astype("float32") + float("nan")
            return results

    # evaluation mode of BatchNorm keeps the NaN within its own image; a zero learning rate keeps the model
    cfg = config(
        scenes, tmp_path, **{"train_cfg.max_iters": 17, "optim_wrapper.optimizer.lr": 0.0, "log_level": "INFO"}
    )
    cfg.param_scheduler = None
    cfg.train_dataloader.dataset.pipeline.insert(2, dict(type="BreakSceneSeven"))
    cfg.model.backbone.norm_eval = True
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.norm_cfg = dict(type="GN", num_groups=1)
    cfg.optim_wrapper = dict(type="ForgetfulOptimWrapper", optimizer=dict(type="SGD", lr=0.0))

    @OPTIM_WRAPPERS.register_module(name="ForgetfulOptimWrapper", force=True)
    class ForgetfulOptimWrapper(OptimWrapper):
        def step(self, **kwargs: Any) -> None:
            """NaN gradients must not reach the parameters: this is about scores."""

    runner, _ = train(cfg)
    summary = json.loads(Path(runner.work_dir, "infobatch_summary.json").read_text())
    import numpy as np

    saved = read_scores(runner.work_dir)
    assert summary["nonfinite_losses"] >= 1
    assert np.isnan(saved["score"][7])
    assert np.isfinite(np.delete(saved["score"], 7)).all()
    log = next(Path(runner.log_dir).glob("*.log")).read_text()
    assert "NaN or infinite" in log


def test_warns_once_when_nothing_could_be_pruned(scenes: Path, tmp_path: Path) -> None:
    # a global batch of 11 leaves no count of well-learned samples that divides
    cfg = config(
        scenes, tmp_path, **{"train_dataloader.batch_size": 11, "log_level": "INFO", "train_cfg.max_iters": 12}
    )
    runner, _ = train(cfg)
    log = next(Path(runner.log_dir).glob("*.log")).read_text()
    summary = json.loads(Path(runner.work_dir, "infobatch_summary.json").read_text())
    full = [entry for entry in summary["per_pass"][1:4] if entry["kept_ratio"] == 1]
    assert log.count("nothing could be pruned") == min(1, len(full))


def test_a_policy_that_decides_to_prune_nothing_says_why_and_once(scenes: Path, tmp_path: Path) -> None:
    cfg = config(scenes, tmp_path, log_level="INFO")
    cfg.custom_hooks = [dict(type="InfoBatchHook", policy=dict(type="auto", bar=50.0))]
    runner, _ = train(cfg)
    log = next(Path(runner.log_dir).glob("*.log")).read_text()
    assert log.count("policy 'auto' visits every sample: by the scores, the limit is ") == 1
    assert "nothing could be pruned" not in log
    summary = json.loads(Path(runner.work_dir, "infobatch_summary.json").read_text())
    assert {entry["kept"] for entry in summary["per_pass"]} == {20}  # of 22, the last of which fill no batch
