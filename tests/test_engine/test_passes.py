"""What a pruned run does, pass by pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mmseg")

from mmengine.dataset import InfiniteSampler
from mmengine.runner import Runner

from infobatch_mm.core.score_file import read_scores
from infobatch_mm.engine import InfoBatchEpochLoop, InfoBatchIterLoop

from .toy import EPOCHS, Recorder, config, train

N, B, ITERS, EPOCH_COUNT = 22, 4, 33, 6


def split_by_pass(runner: Runner, recorder: Recorder) -> list[list[list[int]]]:
    """Batches of indices of each pass, by the counts that the summary states."""
    summary = json.loads(Path(runner.work_dir, "infobatch_summary.json").read_text())
    batches, passes = list(recorder.indices), []
    for entry in summary["per_pass"]:
        current: list[list[int]] = []
        while sum(map(len, current)) < entry["kept"]:
            current.append(batches.pop(0))
        passes.append(current)
    assert not batches
    return passes


SAVING = {"default_hooks.checkpoint.save_last": True}


@pytest.fixture(scope="module")
def by_iteration(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Runner, Recorder]:
    return train(config(scenes, tmp_path_factory.mktemp("iterations"), **SAVING))


@pytest.fixture(scope="module")
def by_epoch(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Runner, Recorder]:
    return train(config(scenes, tmp_path_factory.mktemp("epochs"), **EPOCHS))


def test_iteration_loop_walks_each_plan_once_in_full_batches(by_iteration: tuple[Runner, Recorder]) -> None:
    check_iterations(*by_iteration)


def test_workers_walk_each_plan_once_in_full_batches(scenes: Path, tmp_path: Path) -> None:
    workers = {"train_dataloader.num_workers": 2, "train_dataloader.persistent_workers": True}
    check_iterations(*train(config(scenes, tmp_path, **workers, **SAVING)))


def check_iterations(runner: Runner, recorder: Recorder) -> None:
    assert isinstance(runner.train_loop, InfoBatchIterLoop)
    passes = split_by_pass(runner, recorder)
    assert len(passes) == 6
    for batches in passes:
        assert all(len(batch) == B for batch in batches)
        visited = sum(batches, [])
        assert len(set(visited)) == len(visited)
    assert runner.iter == runner.max_iters == len(recorder.losses) < ITERS
    # never rising, exact from the last plan on
    assert recorder.max_iters == sorted(recorder.max_iters, reverse=True)
    assert recorder.max_iters[-1] == runner.iter
    assert any(len(sum(batches, [])) < N - N % B for batches in passes[1:5])
    assert Path(runner.work_dir, f"iter_{runner.iter}.pth").is_file()
    # the host's own validation at the last iteration
    assert "val/mIoU" in runner.message_hub.log_scalars


def test_epoch_loop_runs_all_its_epochs(by_epoch: tuple[Runner, Recorder]) -> None:
    runner, recorder = by_epoch
    assert isinstance(runner.train_loop, InfoBatchEpochLoop)
    passes = split_by_pass(runner, recorder)
    assert runner.epoch == len(passes) == EPOCH_COUNT
    assert runner.iter == runner.max_iters == recorder.max_iters[-1]
    # first pass: nothing has a score; last two (delta=0.75 of 6 is 4.5): annealing
    for whole in (passes[0], passes[5]):
        assert sorted(sum(whole, [])) == list(range(N))
        assert [len(batch) for batch in whole] == [4, 4, 4, 4, 4, 2]  # the host's own tail
    pruned = [batches for batches in passes[1:5] if len(sum(batches, [])) < N]
    assert pruned
    assert all(len(batch) == B for batches in pruned for batch in batches)


def test_weights_are_the_inverse_inclusion_probability(by_epoch: tuple[Runner, Recorder]) -> None:
    runner, recorder = by_epoch
    start = 0
    for batches in split_by_pass(runner, recorder):
        weights = sum(recorder.weights[start : start + len(batches)], [])
        start += len(batches)
        assert sum(weights) == pytest.approx(N, rel=1e-6)


def test_score_is_the_main_heads_own_unweighted_loss(scenes: Path, tmp_path: Path) -> None:
    """The batch mean of the log is the mean of the scores where every pixel is valid or counted."""
    overrides = {
        "train_dataloader.batch_size": 1,
        "model.backbone.strides": (1, 1, 1, 1),  # BatchNorm needs more than one pixel
        "model.decode_head.loss_decode": dict(type="CrossEntropyLoss", avg_non_ignore=True),
    }
    runner, recorder = train(config(scenes, tmp_path, **EPOCHS, **overrides))
    last_seen = {}
    for indices, losses in zip(recorder.indices, recorder.losses, strict=True):
        last_seen[indices[0]] = losses["decode.loss_ce"]
    saved = read_scores(runner.work_dir)
    assert saved["score"].tolist() == pytest.approx([last_seen[i] for i in range(N)], rel=1e-5)


def test_log_shows_the_hosts_unweighted_loss(by_epoch: tuple[Runner, Recorder]) -> None:
    _, recorder = by_epoch
    for losses in recorder.losses:
        assert losses["loss"] == pytest.approx(losses["decode.loss_ce"] + losses["aux.loss_ce"], rel=1e-6)
    # a weight of 2 would double it: the log stays in the range of the first, unweighted pass
    first = max(losses["loss"] for losses in recorder.losses[:6])
    assert max(losses["loss"] for losses in recorder.losses[6:]) < 1.2 * first


def test_summary_adds_up(by_iteration: tuple[Runner, Recorder]) -> None:
    runner, recorder = by_iteration
    summary = json.loads(Path(runner.work_dir, "infobatch_summary.json").read_text())
    visits = sum(map(len, recorder.indices))
    assert summary["policy"] == "infobatch"
    assert (summary["prune_ratio"], summary["delta"], summary["num_samples"]) == (0.5, 0.75, N)
    assert summary["passes_done"] == summary["passes_total"] == 6
    assert summary["visits"] == visits == sum(entry["kept"] for entry in summary["per_pass"])
    assert summary["visits_full"] == ITERS * B
    assert summary["saved_ratio"] == pytest.approx(1 - visits / (ITERS * B))
    assert (summary["iterations"], summary["iterations_full"]) == (runner.iter, ITERS)
    assert summary["wall_time_s"] > 0
    worth = {"worth", "cost", "efficiency", "limit"}
    assert set(summary["per_pass"][0]) == {"pass", "kept", "skipped", "kept_ratio", "threshold", "score_mean"} | worth
    saved = read_scores(runner.work_dir)
    assert saved["times_seen"].sum() == visits
    assert saved["name"].tolist() == [f"training/{i:05d}.jpg" for i in range(N)]


def test_partial_last_pass_follows_the_unpruned_run(scenes: Path, tmp_path: Path) -> None:
    runner, recorder = train(config(scenes, tmp_path, **{"train_cfg.max_iters": 20}))  # 3.6 passes
    passes = split_by_pass(runner, recorder)
    assert len(passes) == 4
    assert len(passes[-1]) == 3  # 80 - 66 = 14 samples left: three full batches, annealing
    assert runner.iter == runner.max_iters


def test_written_out_config_meets_in_the_same_objects(
    by_iteration: tuple[Runner, Recorder], scenes: Path, tmp_path: Path
) -> None:
    _, by_hook = by_iteration
    ours = dict(_delete_=True, type="InfoBatchSampler", prune_ratio=0.5, delta=0.75)
    for name, sampler, hooks in (
        ("b", ours, []),
        ("c", ours, [dict(type="InfoBatchHook")]),
        ("d", dict(type="InfiniteSampler"), [dict(type="InfoBatchHook", prune_ratio=0.5, delta=0.75)]),
    ):
        runner, written = train(
            config(
                scenes,
                tmp_path / name,
                custom_hooks=hooks,
                **{"train_dataloader.sampler": sampler, "train_cfg.type": "InfoBatchIterLoop"},
            )
        )
        assert written.indices[:5] == by_hook.indices[:5]
        if hasattr(InfiniteSampler, "skip"):
            # Upstream's loop, which only the hook's road builds, draws a number before the weights are initialised.
            assert written.indices == by_hook.indices
            assert written.losses == by_hook.losses
        assert runner.iter == runner.max_iters


def test_one_seed_one_run(by_iteration: tuple[Runner, Recorder], scenes: Path, tmp_path: Path) -> None:
    _, first = by_iteration
    _, again = train(config(scenes, tmp_path / "b"))
    _, other = train(config(scenes, tmp_path / "c", **{"randomness.seed": 4}))
    assert first.indices == again.indices
    assert first.losses == again.losses
    assert first.indices != other.indices


@pytest.mark.parametrize(
    "wrap",
    [
        lambda dataset: dict(type="ConcatDataset", datasets=[dataset, dataset]),
        lambda dataset: dict(type="RepeatDataset", times=3, dataset=dict(type="ConcatDataset", datasets=[dataset] * 2)),
    ],
    ids=["concatenated", "concatenated and repeated"],
)
def test_wrapped_data_sets_score_each_sample_under_its_outer_index(scenes: Path, tmp_path: Path, wrap: Any) -> None:
    cfg = config(scenes, tmp_path, **{"train_cfg.max_iters": 33})
    cfg.train_dataloader.dataset = wrap(cfg.train_dataloader.dataset.to_dict())
    runner, recorder = train(cfg)
    names = [f"{i % N:05d}.jpg" for i in range(2 * N)]
    for indices, batch in zip(recorder.indices, recorder.names, strict=True):
        assert [names[i] for i in indices] == batch
    saved = read_scores(runner.work_dir)
    assert len(saved["score"]) == 2 * N
    assert saved["name"].tolist() == [f"training/{name}" for name in names]


def test_class_balanced_data_set(scenes: Path, tmp_path: Path) -> None:
    from mmengine.dataset import ClassBalancedDataset
    from mmseg.registry import DATASETS

    from infobatch_mm.engine.sample_names import sample_name

    cfg = config(scenes, tmp_path, **EPOCHS)

    @DATASETS.register_module(name="ScenesWithCategories", force=True)
    class ScenesWithCategories(DATASETS.get("ADE20KDataset")):  # type: ignore[misc]
        def get_cat_ids(self, idx: int) -> list[int]:
            return [0] if idx == 0 else [1]

    cfg.train_dataloader.dataset.type = "ScenesWithCategories"
    cfg.train_dataloader.dataset = dict(
        type="ClassBalancedDataset", oversample_thr=0.2, dataset=cfg.train_dataloader.dataset.to_dict()
    )
    runner, recorder = train(cfg)
    balanced = ClassBalancedDataset(runner.train_dataloader.dataset.dataset, 0.2)
    assert len(balanced) > N
    for indices, batch in zip(recorder.indices, recorder.names, strict=True):
        assert [sample_name(balanced, i) for i in indices] == batch


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_replaced_sample_is_not_recorded_under_the_wrong_index(scenes: Path, tmp_path: Path, workers: int) -> None:
    from mmseg.registry import TRANSFORMS

    @TRANSFORMS.register_module(name="DropSceneFive", force=True)
    class DropSceneFive:
        def __call__(self, results: dict) -> dict | None:
            return None if results["img_path"].endswith("00005.jpg") else results

    cfg = config(scenes, tmp_path, **{"train_dataloader.num_workers": workers})
    cfg.train_dataloader.dataset.pipeline.insert(1, dict(type="DropSceneFive"))
    runner, recorder = train(cfg)
    asked = [indices.index(5) for indices in recorder.indices if 5 in indices]
    assert asked
    saved = read_scores(runner.work_dir)
    assert saved["times_seen"][5] == 0
    assert np.isnan(saved["score"][5])
    summary = json.loads(Path(runner.work_dir, "infobatch_summary.json").read_text())
    assert summary["unusable_visits"] == len(asked)
    assert "_rand_another" not in vars(runner.train_dataloader.dataset._wrapped)


def test_workers_made_anew_for_a_pass_repeat_no_augmentation(scenes: Path, tmp_path: Path) -> None:
    """Without shuffling, equal worker seeds would flip the same images in every pass."""
    hooks = [dict(type="InfoBatchHook", prune_ratio=0.0)]
    overrides = {"train_dataloader.num_workers": 1, "train_dataloader.sampler.shuffle": False}
    _, recorder = train(config(scenes, tmp_path, custom_hooks=hooks, **EPOCHS, **overrides))
    assert recorder.names[:6] == recorder.names[6:12]
    flips = [tuple(recorder.pixels[start : start + 6]) for start in range(0, 36, 6)]
    assert len(set(flips)) > 1


def test_restores_the_host_afterwards(by_iteration: tuple[Runner, Recorder]) -> None:
    from mmengine.hooks import ParamSchedulerHook
    from mmseg.models.losses.cross_entropy_loss import cross_entropy

    runner, _ = by_iteration
    assert runner.model.decode_head.loss_decode.cls_criterion is cross_entropy
    assert runner.model.auxiliary_head.loss_decode.cls_criterion is cross_entropy
    for hook in runner.hooks:
        if isinstance(hook, ParamSchedulerHook):
            assert "after_train_iter" not in vars(hook)
    assert "infobatch_mm" not in repr(runner.model)
    assert not [key for key in runner.model.state_dict() if "infobatch" in key]
