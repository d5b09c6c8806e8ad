"""Repeated data sets: looked through by loops of iterations, units of their own in loops of epochs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.dataset import BaseDataset, ClassBalancedDataset, ConcatDataset, RepeatDataset
from mmengine.runner import Runner

from infobatch_mm.core.score_file import read_scores
from infobatch_mm.demo.street import draw_dataset
from infobatch_mm.engine.repeats import is_repeat, scored_units
from infobatch_mm.engine.resume import check_units

from .test_resume import killed_and_resumed
from .toy import EPOCHS, ONE_LINE, Recorder, config, train

FOR_EVER = 40_000
NUM, BATCH, ITERS = 20, 4, 40  # eight passes over twenty images, as of DRIVE


class Images(BaseDataset):
    def load_data_list(self) -> list[dict]:
        return [{"img_path": f"{self.ann_file}/{i}.jpg"} for i in range(int(self.data_root))]

    def _join_prefix(self) -> None:
        pass


def images(length: int, name: str = "a") -> Images:
    return Images(name, data_root=str(length), serialize_data=False)


class ReadsOtherwise(RepeatDataset):
    def __getitem__(self, idx: int) -> Any:
        return self.dataset[idx // self.times]


class OtherName(RepeatDataset):
    """As a host's alias."""


# ---- what is scored -----------------------------------------------------------------------------------------


def test_a_loop_of_iterations_looks_through_the_outermost_repeats() -> None:
    bare = images(20)
    for repeated in (
        RepeatDataset(bare, times=FOR_EVER),
        OtherName(bare, times=3, lazy_init=True),
        RepeatDataset(dict(type=RepeatDataset, dataset=bare, times=7), times=50),
    ):
        units = scored_units(repeated, 4, by_iteration=True)
        assert units.dataset is bare
        assert f"its 20 images, not over {len(repeated):,}" in units.message
    outer = RepeatDataset(dict(type=ConcatDataset, datasets=parts()), times=10)
    units = scored_units(outer, 4, by_iteration=True)
    assert units.dataset is outer.dataset
    assert len(units.dataset) == 20


def parts() -> list[Any]:
    """Ten images, five of them three times."""
    return [images(5, "a"), dict(type=RepeatDataset, dataset=images(5, "b"), times=3)]


def test_copies_elsewhere_have_scores_of_their_own_and_it_is_said() -> None:
    repeated = RepeatDataset(images(20), times=2)
    for dataset, by_iteration, said in (
        (repeated, False, "40 samples are repeats of 20 images"),
        (ConcatDataset(parts()), True, "20 samples are repeats of 10"),
        (images(7), True, ""),
        (RepeatDataset(images(7), times=1), False, ""),
        (ConcatDataset([images(3), images(4)]), True, ""),
        (ClassBalancedDatasetOf(images(7)), True, ""),
    ):
        units = scored_units(dataset, 4, by_iteration)
        assert units.dataset is dataset
        assert said in units.message
        assert bool(said) == bool(units.message)


class ClassBalancedDatasetOf(ClassBalancedDataset):
    def __init__(self, dataset: Any) -> None:
        self.dataset, self.repeat_indices, self._fully_initialized = dataset, [0, 0, *range(len(dataset))], True


def test_a_repeat_that_reads_otherwise_is_no_repeat() -> None:
    odd = ReadsOtherwise(images(5), times=3)
    assert not is_repeat(odd)
    assert scored_units(odd, 2, by_iteration=True).dataset is odd


@pytest.mark.parametrize(
    ("distinct", "batch", "times"),
    [
        (20, 4, 1),
        (22, 4, 1),
        (15, 4, 2),  # three of 15 would be left out, two of 30 are not a tenth
        (20, 16, 4),
        (5, 8, 5),
        (1, 8, 8),
        (16, 16, 1),
        (1000, 300, 1),
        (1000, 350, 3),
    ],
)
def test_of_few_images_as_many_copies_are_kept_as_fill_their_batches(distinct: int, batch: int, times: int) -> None:
    repeated = RepeatDataset(images(distinct), times=FOR_EVER)
    units = scored_units(repeated, batch, by_iteration=True)
    assert len(units.dataset) == times * distinct
    assert (f"{times} copies" in units.message) == (times > 1)
    assert len(units.dataset) % batch <= len(units.dataset) / 10
    names = [units.dataset.get_data_info(i)["img_path"] for i in range(len(units.dataset))]
    assert names == [f"a/{i % distinct}.jpg" for i in range(len(names))]
    assert len(repeated) == FOR_EVER * distinct  # the host's own is as it was
    # never more than there are
    assert len(scored_units(RepeatDataset(images(5), times=2), 50, by_iteration=True).dataset) == 10


# ---- runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twenty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_dataset(tmp_path_factory.mktemp("twenty"), num_train=NUM, num_val=2, size=32)


def drive(root: Path, work_dir: Path, times: int = FOR_EVER, **overrides: Any) -> Any:
    """A config as DRIVE's: few images, repeated for ever, a loop of iterations."""
    poly = [dict(type="PolyLR", power=0.9, eta_min=1e-4, by_epoch=False, begin=0, end=ITERS)]
    cfg = config(root, work_dir, **{"train_cfg.max_iters": ITERS, "param_scheduler": poly, "log_level": "INFO"})
    repeated(cfg, times)
    cfg.merge_from_dict(copy.deepcopy(overrides))
    return cfg


def repeated(cfg: Any, times: int = FOR_EVER) -> Any:
    cfg.train_dataloader.dataset = dict(
        type="RepeatDataset", times=times, dataset=cfg.train_dataloader.dataset.to_dict()
    )
    return cfg


def books(work_dir: Path) -> dict[str, Any]:
    return json.loads(Path(work_dir, "infobatch_summary.json").read_text())


def scores(work_dir: Path) -> Any:
    return read_scores(work_dir)


def log_of(runner: Runner) -> str:
    return next(Path(runner.log_dir).glob("*.log")).read_text()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_small_data_set_repeated_for_ever_is_pruned_image_by_image(
    twenty: Path, tmp_path: Path, workers: int
) -> None:
    runner, recorder = train(drive(twenty, tmp_path, **{"train_dataloader.num_workers": workers}))
    summary, saved = books(tmp_path), scores(tmp_path)
    assert (summary["num_samples"], summary["passes_total"]) == (NUM, 8)
    assert summary["saved_ratio"] > 0.1
    assert any(entry["kept"] < NUM for entry in summary["per_pass"][1:6])
    # a score for each image, of as many visits as were made
    assert saved["name"].tolist() == [f"training/{i:05d}.jpg" for i in range(NUM)]
    assert saved["times_seen"].sum() == summary["visits"] == sum(map(len, recorder.indices))
    assert saved["times_seen"].min() >= 3
    for indices, names in zip(recorder.indices, recorder.names, strict=True):
        assert names == [f"{i:05d}.jpg" for i in indices]
    # the learning rate ends at its end, after fewer iterations
    assert runner.iter == runner.max_iters == len(recorder.losses) < ITERS
    assert recorder.boundary_lrs[-1] == pytest.approx(1e-4)
    assert runner.param_schedulers[0].last_step == ITERS - 1
    assert "a pass is one over its 20 images, not over 800,000 repeated ones" in log_of(runner)


def test_written_out_in_the_config_it_is_the_same_run(twenty: Path, tmp_path: Path) -> None:
    _, by_hook = train(drive(twenty, tmp_path / "a"))
    ours = dict(_delete_=True, type="InfoBatchSampler", prune_ratio=0.5, delta=0.75)
    written_out = {"train_dataloader.sampler": ours, "train_cfg.type": "InfoBatchIterLoop", "custom_hooks": []}
    _, written = train(drive(twenty, tmp_path / "b", **written_out))
    assert written.indices[:5] == by_hook.indices[:5]
    assert books(tmp_path / "b")["num_samples"] == NUM


@pytest.mark.parametrize(("kill", "interval"), [pytest.param(9, 8, marks=pytest.mark.slow), (21, 7)])
def test_a_killed_run_on_repeats_goes_on_exactly(twenty: Path, tmp_path: Path, kill: int, interval: int) -> None:
    def run(root: Path, work_dir: Path, **overrides: Any) -> Recorder:
        return train(repeated(config(root, work_dir, **overrides)))[1]

    straight = run(twenty, tmp_path / "straight")
    dataset = config(twenty, tmp_path).train_dataloader.dataset.to_dict()
    wrapped = dict(_delete_=True, type="RepeatDataset", times=FOR_EVER, dataset=dataset)
    resumed = killed_and_resumed(twenty, tmp_path / "killed", kill, interval, **{"train_dataloader.dataset": wrapped})
    start = kill - kill % interval
    assert resumed.indices == straight.indices[start:]
    assert resumed.weights == straight.weights[start:]
    assert resumed.lrs == straight.lrs[start:]
    assert resumed.losses == straight.losses[start:]
    a, b = (scores(tmp_path / name)["score"] for name in ("straight", "killed"))
    assert np.array_equal(a, b)


def test_another_batch_that_keeps_other_copies_is_told_apart_from_another_data_set() -> None:
    check_units(20, 20, 20)
    check_units(21, 20, 20)  # another data set, which is refused as one
    for saved, here, there, now in ((20, 40, 1, 2), (40, 20, 2, 1), (800_000, 20, 40_000, 1)):
        with pytest.raises(ValueError, match=rf"scores {there} copies of the 20 images .*, this run {now}: .*batch"):
            check_units(saved, here, 20)


def test_the_host_alone_takes_the_same_images_in_the_same_order(twenty: Path, tmp_path: Path) -> None:
    """policy='none' leaves loader and order alone; the scores are those of the images all the same."""
    runner, watched = train(drive(twenty, tmp_path / "none", custom_hooks=[dict(type="InfoBatchHook", policy="none")]))
    _, host = train(drive(twenty, tmp_path / "host", custom_hooks=[]))
    assert watched.names == host.names
    assert watched.losses == host.losses
    summary, saved = books(tmp_path / "none"), scores(tmp_path / "none")
    assert (summary["num_samples"], summary["passes_done"], summary["saved_ratio"]) == (NUM, 8, 0)
    made = np.bincount([int(name[:5]) for batch in host.names for name in batch], minlength=NUM)
    assert saved["times_seen"].tolist() == made.tolist()
    assert saved["name"].tolist() == [f"training/{i:05d}.jpg" for i in range(NUM)]
    assert len(runner.train_dataloader.dataset) == FOR_EVER * NUM


def test_in_a_loop_of_epochs_a_copy_is_a_sample_and_it_is_said(scenes: Path, tmp_path: Path) -> None:
    runner, _ = train(repeated(config(scenes, tmp_path, log_level="INFO", **EPOCHS), times=2))
    assert books(tmp_path)["num_samples"] == 44
    assert len(scores(tmp_path)["score"]) == 44
    assert "44 samples are repeats of 22 images: each copy has a score of its own" in log_of(runner)


def test_a_data_set_that_is_concatenated_with_itself(scenes: Path, tmp_path: Path) -> None:
    """One object twice: the replacement of broken images was taken off it twice."""
    from mmseg.registry import DATASETS
    from mmseg.utils import register_all_modules
    from torch.utils.data import DataLoader

    register_all_modules()
    cfg = config(scenes, tmp_path)
    host = Runner.build_dataloader(cfg.train_dataloader, seed=3)
    part = DATASETS.build(cfg.train_dataloader.dataset)
    twice = ConcatDataset([part, part])
    sampler = type(host.sampler)(twice, shuffle=True, seed=3)
    cfg.train_dataloader = DataLoader(twice, 4, sampler=sampler, collate_fn=host.collate_fn)
    runner = Runner(**{key: value for key, value in cfg.items() if key in INIT})
    runner.register_hook(recorder := Recorder())
    runner.train()
    names = [f"{i % 22:05d}.jpg" for i in range(44)]
    for indices, batch in zip(recorder.indices, recorder.names, strict=True):
        assert [names[i] for i in indices] == batch
    assert "_rand_another" not in vars(part)


INIT = (
    *("model", "work_dir", "train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler", "default_hooks"),
    *("custom_hooks", "log_processor", "log_level", "randomness", "default_scope", "experiment_name"),
)


@pytest.mark.slow
def test_thousands_of_passes_are_logged_in_a_few_hundred_lines(twenty: Path, tmp_path: Path) -> None:
    few = {
        "train_dataloader.batch_size": 20,
        "train_cfg.max_iters": 240,
        "model.auxiliary_head": None,
        **dict.fromkeys(("val_dataloader", "val_cfg", "val_evaluator")),
    }
    cfg = drive(twenty, tmp_path, **few, custom_hooks=[dict(ONE_LINE[0], prune_ratio=0.0)])
    cfg.param_scheduler = []
    runner, _ = train(cfg)
    lines = [line for line in log_of(runner).splitlines() if " done: kept" in line]
    assert 100 < len(lines) <= 122
    assert "one in 2 of 240 passes is logged" in log_of(runner)
    assert books(tmp_path)["passes_done"] == 240
    assert len(books(tmp_path)["per_pass"]) == 240
    assert torch.isfinite(torch.tensor(scores(tmp_path)["score"])).all()
