"""A run that was killed goes on as if it had not been."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmseg")


from .toy import EPOCHS, PIPELINE, KillAt, Killed, Recorder, config, train


def killed_and_resumed(scenes: Path, work_dir: Path, kill: int, interval: int, **overrides: Any) -> Recorder:
    cfg = config(scenes, work_dir, **overrides)
    cfg.default_hooks.checkpoint.interval = interval
    with pytest.raises(Killed):
        train(cfg, KillAt(kill))
    cfg = config(scenes, work_dir, resume=True, **overrides)
    return train(cfg)[1]


def how(loop: str, workers: int) -> dict[str, Any]:
    overrides = dict(EPOCHS) if loop == "epoch" else {}
    overrides["train_dataloader.num_workers"] = workers
    if workers:  # workers begin their augmentation draws anew: without any, even the later plans are equal
        overrides["train_dataloader.dataset.pipeline"] = [step for step in PIPELINE if step["type"] != "RandomFlip"]
    return overrides


@pytest.fixture(scope="module")
def straight_run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[Path, Recorder]]:
    """Work directory and record of a run from begin to end, each made once."""

    @functools.cache
    def run(loop: str, workers: int) -> tuple[Path, Recorder]:
        work_dir = tmp_path_factory.mktemp("straight")
        return work_dir, train(config(scenes, work_dir, **how(loop, workers)))[1]

    return run


SHORT = {("iter", 0, 12, 6), ("iter", 2, 17, 5), ("epoch", 0, 17, 5)}


@pytest.mark.parametrize(
    ("loop", "workers", "kill", "interval"),
    [
        pytest.param(*each, marks=[] if each in SHORT else pytest.mark.slow)
        for loop, workers in itertools.product(("iter", "epoch"), (0, 2))
        for each in [(loop, workers, kill, interval) for kill, interval in ((9, 8), (17, 5), (12, 6))]
    ],
)
def test_resumed_run_visits_the_same_samples(
    straight_run: Callable[[str, int], tuple[Path, Recorder]],
    scenes: Path,
    tmp_path: Path,
    loop: str,
    workers: int,
    kill: int,
    interval: int,
) -> None:
    overrides = how(loop, workers)
    straight_dir, straight = straight_run(loop, workers)
    resumed = killed_and_resumed(scenes, tmp_path / "killed", kill, interval, **overrides)
    start = kill - kill % interval
    assert resumed.indices == straight.indices[start:]
    assert resumed.weights == straight.weights[start:]
    assert resumed.lrs == straight.lrs[start:]
    assert resumed.max_iters == straight.max_iters[start:]
    assert resumed.batch_idx == straight.batch_idx[start:]
    # dropout and, without workers, augmentations repeat: the checkpoint holds the generators of this process
    assert resumed.inputs == straight.inputs[start:]
    assert resumed.losses == straight.losses[start:]
    books = [
        json.loads(Path(folder, "infobatch_summary.json").read_text()) for folder in (straight_dir, tmp_path / "killed")
    ]
    assert {**books[0], "wall_time_s": 0} == {**books[1], "wall_time_s": 0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_resumed_run_with_mixed_precision_visits_the_same_samples(scenes: Path, tmp_path: Path) -> None:
    overrides = {"optim_wrapper.type": "AmpOptimWrapper", "optim_wrapper.accumulative_counts": 2}
    straight = train(config(scenes, tmp_path / "straight", **overrides))[1]
    resumed = killed_and_resumed(scenes, tmp_path / "killed", 12, 5, **overrides)
    assert resumed.indices == straight.indices[10:]
    assert resumed.weights == straight.weights[10:]
    assert resumed.lrs == straight.lrs[10:]


def test_resume_from_checkpoints_at_epoch_ends(
    straight_run: Callable[[str, int], tuple[Path, Recorder]], scenes: Path, tmp_path: Path
) -> None:
    checkpoint = dict(type="CheckpointHook", by_epoch=True, interval=1)
    _, straight = straight_run("epoch", 0)
    cfg = config(scenes, tmp_path / "killed", **EPOCHS)
    cfg.default_hooks.checkpoint = checkpoint
    kill = next(i for i, batch in enumerate(straight.batch_idx) if i > 12 and batch == 2)
    with pytest.raises(Killed):
        train(cfg, KillAt(kill))
    cfg = config(scenes, tmp_path / "killed", resume=True, **EPOCHS)
    cfg.default_hooks.checkpoint = checkpoint
    _, resumed = train(cfg)
    start = len(straight.losses) - len(resumed.losses)
    assert straight.batch_idx[start] == 0
    assert resumed.losses == straight.losses[start:]


@pytest.mark.parametrize("loop", ["iter", pytest.param("epoch", marks=pytest.mark.slow)])
def test_a_validation_after_the_checkpoint_leaves_no_trace(scenes: Path, tmp_path: Path, loop: str) -> None:
    """The checkpoint is written before the validation of the same iteration, which a resumed run skips."""
    overrides = {**EPOCHS, "train_cfg.val_interval": 2} if loop == "epoch" else {"train_cfg.val_interval": 8}
    checkpoint = dict(type="CheckpointHook", by_epoch=loop == "epoch", interval=2 if loop == "epoch" else 8)
    cfg = config(scenes, tmp_path / "straight", **overrides)
    cfg.default_hooks.checkpoint = checkpoint
    straight = train(cfg)[1]
    cfg = config(scenes, tmp_path / "killed", **overrides)
    cfg.default_hooks.checkpoint = checkpoint
    with pytest.raises(Killed):
        train(cfg, KillAt(14))
    cfg = config(scenes, tmp_path / "killed", resume=True, **overrides)
    cfg.default_hooks.checkpoint = checkpoint
    resumed = train(cfg)[1]
    assert resumed.losses == straight.losses[-len(resumed.losses) :]


def test_resuming_a_finished_run_trains_no_further(scenes: Path, tmp_path: Path) -> None:
    short = {"train_cfg.max_iters": 12}
    two = {**EPOCHS, "train_cfg.max_epochs": 2}
    for overrides, name in ((short, "iter"), (two, "epoch")):
        cfg = config(scenes, tmp_path / name, **overrides)
        cfg.default_hooks.checkpoint.save_last = True
        runner, _ = train(cfg)
        before = Path(runner.work_dir, "infobatch_summary.json").read_text()
        runner, recorder = train(config(scenes, tmp_path / name, resume=True, **overrides))
        assert not recorder.losses
        after = json.loads(Path(runner.work_dir, "infobatch_summary.json").read_text())
        before_book = json.loads(before)
        assert {**after, "wall_time_s": 0} == {**before_book, "wall_time_s": 0}


def test_load_from_takes_weights_only(scenes: Path, tmp_path: Path) -> None:
    cfg = config(scenes, tmp_path / "first")
    cfg.default_hooks.checkpoint.save_last = True
    runner, _ = train(cfg)
    checkpoint = next(Path(runner.work_dir).glob("iter_*.pth"))
    _, tuned = train(config(scenes, tmp_path / "second", load_from=str(checkpoint)))
    assert len(tuned.indices[0]) == 4
    assert set(sum(tuned.weights[:5], [])) == {1.0}  # a first pass: no scores were taken over


@pytest.mark.parametrize("loop", ["iter", pytest.param("epoch", marks=pytest.mark.slow)])
def test_a_checkpoint_written_without_us_starts_with_empty_scores(scenes: Path, tmp_path: Path, loop: str) -> None:
    overrides = dict(EPOCHS) if loop == "epoch" else {}
    cfg = config(scenes, tmp_path, **{**overrides, "custom_hooks": []})
    cfg.default_hooks.checkpoint.interval = 1 if loop == "epoch" else 8
    cfg.default_hooks.checkpoint.by_epoch = loop == "epoch"
    with pytest.raises(Killed):
        train(cfg, KillAt(13))
    _, host = train(config(scenes, tmp_path / "host", **{**overrides, "custom_hooks": []}))
    runner, resumed = train(config(scenes, tmp_path, resume=True, **overrides, log_level="INFO"))
    start = 12 if loop == "epoch" else 8
    assert resumed.lrs[0] == host.lrs[start]
    assert runner.iter == runner.max_iters
    log = next(Path(runner.log_dir).glob("*.log")).read_text()
    assert "written without InfoBatchHook" in log
    summary = json.loads(Path(runner.work_dir, "infobatch_summary.json").read_text())
    # the iterations before the kill were not pruned, and counted as such
    unpruned = 22 * 2 if loop == "epoch" else 8 * 4
    assert summary["visits"] == pytest.approx(unpruned + sum(map(len, resumed.indices)), abs=4)
    assert 0 < summary["saved_ratio"] < 0.3
    # the pass in hand is finished in full, then pruning starts
    assert set(resumed.weights[0]) == {1.0}
    assert any(weight != 1 for weights in resumed.weights for weight in weights)
