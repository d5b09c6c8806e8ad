"""MMPretrain's classifiers in runs: mixed batches, its hooks, its data sets, and policies."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmpretrain")

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmpretrain.registry import DATASETS

from infobatch_mm.core.score_file import read_scores

from .test_resume import KillAt, Killed
from .toy_classifier import EPOCHS, MIXING, ONE_LINE, PER_EPOCH, PIPELINE, Gradients, N, config, train

LONG = {"train_cfg.max_epochs": 12, "optim_wrapper.optimizer.lr": 0.5}
RANDOM = [dict(type="InfoBatchHook", policy="random", prune_ratio=0.5, delta=0.75)]
SMOOTH = dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original")


def books(work_dir: Path) -> dict[str, Any]:
    return json.loads((work_dir / "infobatch_summary.json").read_text())


def scores(work_dir: Path) -> Any:
    return read_scores(work_dir)


def validated(runner: Runner, metric: str = "accuracy/top1") -> list[float]:
    return runner.message_hub.get_scalar(f"val/{metric}").data[0].tolist()


def assert_equal_models(ours: Runner, theirs: Runner) -> None:
    ours, theirs = ours.model.state_dict(), theirs.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def assert_goes_on(
    tmp_path: Path, kill: int, interval: int, classes: int = 4, **overrides: Any
) -> tuple[Runner, Runner]:
    """A run that was killed and resumed in the middle of a pass is the straight run's to the bit; returns both."""

    def cfg(name: str, **more: Any) -> Config:
        made = config(tmp_path / name, classes, **copy.deepcopy(overrides), **more)
        made.default_hooks.checkpoint.interval = interval
        return made

    straight_runner, straight = train(cfg("straight"))
    with pytest.raises(Killed):
        train(cfg("killed"), KillAt(kill))
    resumed_runner, resumed = train(cfg("killed", resume=True))
    start = kill - kill % interval
    assert straight.batch_idx[start] > 0 and len(resumed.losses) == len(straight.losses) - start
    assert resumed.indices == straight.indices[start:]
    assert resumed.weights == straight.weights[start:]
    assert resumed.inputs == straight.inputs[start:]
    assert resumed.losses == straight.losses[start:]
    assert_equal_models(resumed_runner, straight_runner)
    ours, theirs = books(tmp_path / "killed"), books(tmp_path / "straight")
    assert {**ours, "wall_time_s": 0} == {**theirs, "wall_time_s": 0}
    return resumed_runner, straight_runner


# ---- one line ---------------------------------------------------------------------------------------------


def test_the_one_line_in_a_config_of_the_hosts(tmp_path: Path) -> None:
    (tmp_path / "lenet.py").write_text("""
_base_ = 'mmpretrain::lenet/lenet5_mnist.py'
draw = dict(type='DrawToyImage', size=32, channels=1)
pictures = dict(_delete_=True, type='ToyImages', num_classes=10, pipeline=[draw, dict(type='PackInputs')])
train_dataloader = dict(batch_size=8, num_workers=0, dataset=pictures)
val_dataloader = dict(num_workers=0, dataset=pictures)
test_dataloader = val_dataloader
custom_imports = dict(imports=['infobatch_mm.engine'], allow_failed_imports=False)
custom_hooks = [dict(type='InfoBatchHook', prune_ratio=0.5, delta=0.875)]
""")
    cfg = Config.fromfile(tmp_path / "lenet.py")
    cfg.work_dir, cfg.randomness = str(tmp_path), dict(seed=0)
    runner, recorder = train(cfg)
    assert (runner.epoch, runner.iter) == (5, runner.max_iters)
    assert runner.iter == len(recorder.losses) < 5 * PER_EPOCH
    kept = [entry["kept"] for entry in books(tmp_path)["per_pass"]]
    assert kept[0] == N and min(kept) < N
    assert np.isfinite(scores(tmp_path)["score"]).all()
    assert len(validated(runner)) == 5
    assert (tmp_path / "epoch_5.pth").is_file()


def random_streams() -> list[Any]:
    numpys = np.random.get_state()
    return [random.getstate(), numpys[1].tolist(), *numpys[2:], torch.get_rng_state().tolist()]


def assert_policy_none_is_the_host(tmp_path: Path, classes: int = 4, hooks: Any = (), **overrides: Any) -> None:
    made = []
    for name, added in (("host", []), ("ours", [dict(type="InfoBatchHook", policy="none")])):
        whole = {**overrides, "custom_hooks": [*hooks, *added], "train_cfg.val_interval": 1}
        made.append((*train(config(tmp_path / name, classes, **whole)), random_streams()))
    (host_runner, host, hosts_streams), (runner, ours, our_streams) = made
    assert ours.names == host.names
    assert ours.inputs == host.inputs
    assert ours.losses == host.losses
    assert ours.lrs == host.lrs
    assert_equal_models(runner, host_runner)
    assert validated(runner) == validated(host_runner)
    assert len(validated(runner)) == EPOCHS
    assert our_streams == hosts_streams
    assert scores(tmp_path / "ours")["times_seen"].tolist() == [EPOCHS] * N


@pytest.mark.parametrize("mixing", [None, MIXING], ids=["plain", "mixed"])
def test_policy_none_changes_nothing(tmp_path: Path, mixing: Any) -> None:
    assert_policy_none_is_the_host(tmp_path, **{"model.train_cfg": mixing, "model.head.cal_acc": not mixing})


# ---- what a sample weighs in truth ------------------------------------------------------------------------


def of_plan(plan: Any, indices: list[int]) -> torch.Tensor:
    weights = dict(zip(plan.indices.tolist(), plan.weights.tolist(), strict=True))
    return torch.tensor([weights[index] for index in indices])


def of_pairs(plan: Any, indices: list[int], targets: torch.Tensor) -> torch.Tensor:
    """The chance that both samples of an image were drawn undone, and that they were mixed, by the book.

    Every sample has a class of its own, so that the target tells what an image is made of.
    """
    thinned = plan.indices[plan.weights > 1].tolist()
    kept = len(thinned)
    candidates = round(kept * float(plan.weights.max()))
    weights = []
    for own, target in zip(indices, targets, strict=True):
        made_of = torch.nonzero(target > 0).flatten().tolist()
        assert own in made_of or len(made_of) == 1
        if len(made_of) == 1 or not kept:
            weights.append(candidates / kept if made_of[0] in thinned else 1.0)
            continue
        together = [1.0, kept / candidates, kept * (kept - 1) / (candidates * (candidates - 1))]
        chance = together[sum(index in thinned for index in made_of)]
        weights.append((len(plan) - 1) / (N - 1) / chance)
    return torch.tensor(weights)


@pytest.mark.parametrize("loss", [None, SMOOTH], ids=["cross-entropy", "label-smooth"])
def test_gradients_are_weighed_by_the_plan(tmp_path: Path, loss: Any) -> None:
    gradients = Gradients(smoothing=0.1 if loss else 0.0)
    overrides = {"model.head.loss": loss} if loss else {}
    _, recorder = train(config(tmp_path, **overrides), gradients)
    for weights, plan, indices in zip(gradients.weights, gradients.plans, recorder.indices, strict=True):
        assert torch.allclose(weights, of_plan(plan, indices), rtol=1e-3)
    assert max(float(weights.max()) for weights in gradients.weights) > 1


#: A fifth of the batches remain as they are, in another images change places.
SOMETIMES = dict(
    augments=[*MIXING["augments"], dict(type="ResizeMix", alpha=1.0), dict(type="Mixup", alpha=1e-3)], probs=[0.2] * 4
)
REPEATED = {"train_dataloader.sampler": dict(_delete_=True, type="RepeatAugSampler", num_repeats=3)}


@pytest.mark.parametrize(
    ("mixing", "overrides"),
    [
        pytest.param(MIXING, {}, id="always", marks=pytest.mark.slow),
        pytest.param(SOMETIMES, {}, id="sometimes"),
        pytest.param(MIXING, REPEATED, id="repeated"),
        pytest.param(MIXING, {"custom_hooks": RANDOM}, id="random", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_mixed_images_are_weighed_by_their_pairs(tmp_path: Path, mixing: Any, overrides: Any) -> None:
    gradients = Gradients()
    _, recorder = train(config(tmp_path, N, **{"model.train_cfg": mixing, **LONG, **overrides}), gradients)
    by_pass: dict[int, list[torch.Tensor]] = {}
    for weights, targets, plan, epoch, indices in zip(
        gradients.weights, gradients.targets, gradients.plans, gradients.epochs, recorder.indices, strict=True
    ):
        assert torch.allclose(weights, of_pairs(plan, indices, targets), rtol=1e-3)
        if plan.pruned:
            by_pass.setdefault(epoch, []).append(weights / (N / len(plan)))
    alone = sum(int((targets > 0).sum(1).eq(1).sum()) for targets in gradients.targets)
    assert 0 < alone < 0.6 * sum(map(len, recorder.indices))
    means = torch.stack([torch.cat(weights).mean() for weights in by_pass.values()])
    assert len(means) >= 6
    # N/K in the mean over passes, whose own means vary by which samples were mixed
    error = 5 * float(means.std()) / len(means) ** 0.5
    assert abs(float(means.mean()) - 1) < error + 1e-3 < 0.4
    saved = scores(tmp_path)
    visits = np.bincount(sum(recorder.indices, []), minlength=N)
    assert saved["times_seen"].tolist() == visits.tolist()
    assert np.isfinite(saved["score"]).all() and saved["score"].min() >= 0


def test_mixed_batches_resume_to_the_bit(tmp_path: Path) -> None:
    assert_goes_on(tmp_path, 14, 12, **{"model.train_cfg": MIXING, "model.head.loss": SMOOTH})


# ---- other models -----------------------------------------------------------------------------------------


def retrieval(work_dir: Path, **overrides: Any) -> Config:
    pictures = dict(type="ToyImages", length=12, pipeline=[PIPELINE[0], PIPELINE[2]])
    gallery = dict(
        batch_size=4,
        num_workers=0,
        dataset=pictures,
        sampler=dict(type="DefaultSampler", shuffle=False),
        collate_fn=dict(type="pseudo_collate"),
    )
    hooks = [dict(type="PrepareProtoBeforeValLoopHook"), dict(type="SetAdaptiveMarginsHook")]
    cfg = config(work_dir, **{"train_cfg.val_interval": 1, "custom_hooks": ONE_LINE, **overrides})
    cfg.custom_hooks = [*hooks, *cfg.custom_hooks]
    cfg.model = dict(
        type="ImageToImageRetriever",
        data_preprocessor=dict(type="ClsDataPreprocessor", mean=[120.0] * 3, std=[60.0] * 3),
        image_encoder=dict(type="OneConv"),
        head=dict(type="ArcFaceClsHead", num_classes=4, in_channels=8, scale=8.0),
        prototype=gallery,
    )
    cfg.val_evaluator = dict(type="RetrievalRecall", topk=1)
    return cfg


def test_retrieval_by_arcface_with_margins_of_the_training_labels(tmp_path: Path) -> None:
    host, _ = train(retrieval(tmp_path / "host", custom_hooks=[]))
    runner, recorder = train(retrieval(tmp_path / "ours"))
    assert runner.model.head.margins.tolist() == host.model.head.margins.tolist()
    assert len(set(runner.model.head.margins.tolist())) > 1
    assert len(validated(runner, "retrieval/Recall@1")) == EPOCHS
    assert len(recorder.losses) < EPOCHS * PER_EPOCH
    assert np.isfinite(scores(tmp_path / "ours")["score"]).all()


def test_the_preparation_of_prototypes_leaves_no_trace(tmp_path: Path) -> None:
    """The checkpoint is written before the validation, which a resumed run skips."""

    def cfg(name: str, **more: Any) -> Config:
        made = retrieval(tmp_path / name, **more)
        made.default_hooks.checkpoint.update(by_epoch=True, interval=1)
        return made

    _, straight = train(cfg("straight"))
    with pytest.raises(Killed):
        train(cfg("killed"), KillAt(20))
    _, resumed = train(cfg("killed", resume=True))
    assert resumed.losses == straight.losses[-len(resumed.losses) :]


def test_multi_label_training_is_pruned(tmp_path: Path) -> None:
    @DATASETS.register_module(force=True)
    class SeveralLabels(DATASETS.get("ToyImages")):  # type: ignore[misc]
        def load_data_list(self) -> list[dict]:
            return [dict(each, gt_label=sorted({i % 4, i // 4 % 4})) for i, each in enumerate(super().load_data_list())]

    head = dict(_delete_=True, type="MultiLabelLinearClsHead", num_classes=4, in_channels=8)
    cfg = config(tmp_path, **{"model.head": head, "train_cfg.val_interval": 1})
    cfg.train_dataloader.dataset.type = cfg.val_dataloader.dataset.type = "SeveralLabels"
    cfg.val_evaluator = dict(type="MultiLabelMetric")
    runner, recorder = train(cfg)
    assert len(recorder.losses) < EPOCHS * PER_EPOCH
    assert np.isfinite(scores(tmp_path)["score"]).all()
    assert len(validated(runner, "multi-label/f1-score")) == EPOCHS


def test_multi_task_training_is_pruned_but_for_a_sample_without_a_task(tmp_path: Path) -> None:
    labels = [dict(colour=i % 4, shape=i % 3) if i % 5 else dict(colour=i % 4) for i in range(N)]
    labels[7] = {}
    pictures = [dict(img_path=f"{i:05d}.png", gt_label=label) for i, label in enumerate(labels)]
    (tmp_path / "tasks.json").write_text(json.dumps(dict(metainfo=dict(tasks=["colour", "shape"]), data_list=pictures)))
    pack = dict(type="PackMultiTaskInputs", multi_task_fields=("gt_label",))
    dataset = dict(
        type="MultiTaskDataset",
        ann_file=str(tmp_path / "tasks.json"),
        data_root=str(tmp_path),
        pipeline=[*PIPELINE[:2], pack],
    )
    heads = {key: dict(type="LinearClsHead", num_classes=classes) for key, classes in (("colour", 4), ("shape", 3))}
    cfg = config(tmp_path, **{"train_cfg.val_interval": 1})
    del cfg.model.data_preprocessor["num_classes"]
    cfg.model.head = dict(type="MultiTaskHead", task_heads=heads, in_channels=8)
    cfg.train_dataloader.dataset = cfg.val_dataloader.dataset = dataset
    cfg.val_evaluator = dict(type="MultiTasksMetric", task_metrics={key: [dict(type="Accuracy")] for key in heads})
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter < EPOCHS * PER_EPOCH
    assert len(validated(runner, "colour_accuracy/top1")) == len(validated(runner, "shape_accuracy/top1")) == EPOCHS
    saved = scores(tmp_path)
    assert np.flatnonzero(np.isnan(saved["score"])).tolist() == [7]
    assert books(tmp_path)["unusable_visits"] == EPOCHS  # never scored, never pruned


# ---- data sets, validation and test -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "wrap"),
    [
        (2 * N, lambda dataset: dict(type="RepeatDataset", times=2, dataset=dataset)),
        (N + 34, lambda dataset: dict(type="ClassBalancedDataset", oversample_thr=0.255, dataset=dataset)),
        (N - N // 3, lambda dataset: dict(type="KFoldDataset", fold=1, num_splits=3, seed=5, dataset=dataset)),
    ],
    ids=["repeat", "balanced", "fold"],
)
def test_wrapped_data_sets_are_pruned_by_their_outer_index(tmp_path: Path, length: int, wrap: Any) -> None:
    cfg = config(tmp_path)
    cfg.train_dataloader.dataset = wrap(cfg.train_dataloader.dataset.to_dict())
    _, recorder = train(cfg)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        outer = DATASETS.build(cfg.train_dataloader.dataset)
    names = [outer[i]["data_samples"].img_path for i in range(len(outer))]
    assert [[names[i] for i in indices] for indices in recorder.indices] == recorder.names
    assert scores(tmp_path)["name"].tolist() == names
    assert len(names) == books(tmp_path)["num_samples"] == length
    assert books(tmp_path)["saved_ratio"] > 0


@pytest.mark.parametrize("tta", [False, True], ids=["plain", "tta"])
def test_the_test_loop_is_the_hosts(tmp_path: Path, tta: bool) -> None:
    cfg = config(tmp_path / "run", **{"default_hooks.checkpoint.save_last": True, "optim_wrapper.optimizer.lr": 0.02})
    trained, _ = train(cfg)
    metrics = []
    for name, hooks in (("host", []), ("ours", ONE_LINE)):
        made = config(tmp_path / name, custom_hooks=hooks, load_from=str(next((tmp_path / "run").glob("iter_*.pth"))))
        made.test_dataloader, made.test_evaluator, made.test_cfg = made.val_dataloader, made.val_evaluator, {}
        if tta:
            flips = [dict(type="RandomFlip", prob=1.0), dict(type="RandomFlip", prob=0.0)]
            views = dict(type="TestTimeAug", transforms=[flips, [PIPELINE[2]]])
            made.test_dataloader.dataset.pipeline = [PIPELINE[0], views]
            made.model = dict(type="AverageClsScoreTTA", module=made.model)
        metrics.append(Runner.from_cfg(made).test())
    assert metrics[0] == metrics[1]
    assert 30 < metrics[0]["accuracy/top1"] < 100
    if not tta:
        assert validated(trained) == [metrics[0]["accuracy/top1"]]


# ---- the control ------------------------------------------------------------------------------------------

FIVES = {"train_dataloader.batch_size": 5}  # divides half of the samples


def test_random_pruning_begins_with_the_first_pass(tmp_path: Path) -> None:
    _, host = train(config(tmp_path / "host", custom_hooks=[], **FIVES))
    _, ours = train(config(tmp_path / "ours", custom_hooks=RANDOM, **FIVES))
    summary = books(tmp_path / "ours")
    assert [entry["kept"] for entry in summary["per_pass"]] == [N // 2] * 3 + [N]
    assert [entry["threshold"] for entry in summary["per_pass"]] == [None] * 4
    assert summary["saved_ratio"] == 0.5 * 0.75
    assert (summary["policy"], summary["prune_ratio"], summary["delta"]) == ("random", 0.5, 0.75)
    assert (summary["iterations"], summary["iterations_full"]) == (35, 56)
    assert [set(weights) for weights in ours.weights] == [{2.0}] * 21 + [{1.0}] * 14
    visits = [sum(ours.indices[start : start + 7], []) for start in (0, 7, 14)]
    assert [len(set(visit)) for visit in visits] == [N // 2] * 3
    assert visits[0] != visits[1]
    # Rates of the first pass take two steps at a time.
    assert ours.lrs[:8] == pytest.approx(host.lrs[:15:2], rel=1e-12)


def test_random_plans_know_no_scores(tmp_path: Path) -> None:
    recorders = [
        train(config(tmp_path / str(lr), custom_hooks=RANDOM, **{"optim_wrapper.optimizer.lr": lr}))[1]
        for lr in (0.0, 0.1)
    ]
    assert recorders[0].losses[-1] != recorders[1].losses[-1]
    assert recorders[0].indices == recorders[1].indices


def test_random_pruning_resumes_to_the_bit(tmp_path: Path) -> None:
    assert_goes_on(tmp_path, 14, 10, custom_hooks=RANDOM, **FIVES)
