"""The configs that users run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmengine")

from mmengine.config import Config

from infobatch_mm.zoo import config_path

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in ROOT.glob("configs/*/*.py") if path.parent.name != "_base_")
PRUNED = [path for path in CONFIGS if "-infobatch" in path.name]


def load(path: Path) -> Config:
    try:
        return Config.fromfile(path, import_custom_modules=False)
    except ValueError as error:
        if "is not installed" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("path", PRUNED, ids=lambda path: path.stem)
def test_pruned_config_is_its_twin_and_one_line(path: Path) -> None:
    twin = path.with_name(path.name.replace("-infobatch", ""))
    pruned, unpruned = load(path), load(twin)
    extra = {"custom_imports", "custom_hooks"}
    assert set(pruned) - set(unpruned) == extra
    assert {key: pruned[key] for key in unpruned} == {key: unpruned[key] for key in unpruned}
    assert [hook.type for hook in pruned.custom_hooks] == ["InfoBatchHook"]


@pytest.mark.parametrize("path", [p for p in CONFIGS if p not in PRUNED], ids=lambda path: path.stem)
def test_every_unpruned_config_has_a_pruned_twin(path: Path) -> None:
    twins = [p for p in PRUNED if p.parent == path.parent and p.name.replace("-infobatch", "") == path.name]
    assert len(twins) == 1


@pytest.mark.parametrize("path", [p for p in CONFIGS if "ade20k" in p.name], ids=lambda path: path.stem)
def test_ade20k_configs_are_the_real_ones(path: Path) -> None:
    cfg = load(path)
    assert cfg.train_dataloader.dataset.data_root == "data/ade/ADEChallengeData2016"
    heads = [cfg.model.decode_head, *_as_list(cfg.model.get("auxiliary_head"))]
    assert {head.num_classes for head in heads} == {150}
    assert cfg.train_cfg.max_iters in (80000, 160000)


@pytest.mark.parametrize("path", [p for p in CONFIGS if re.search("_(cifar100?|in1k)$", p.stem)], ids=lambda p: p.stem)
def test_cifar_and_imagenet_configs_are_the_real_ones(path: Path) -> None:
    cfg = load(path)
    data_set = path.stem.rsplit("_", 1)[-1]
    names = {"cifar10": ("CIFAR10", 10, 200), "cifar100": ("CIFAR100", 100, 200), "in1k": ("ImageNet", 1000, None)}
    data_type, num_classes, max_epochs = names[data_set]
    assert {cfg[f"{split}_dataloader"].dataset.type for split in ("train", "val", "test")} == {data_type}
    assert cfg.model.head.num_classes == num_classes
    assert cfg.train_cfg.max_epochs in ([max_epochs] if max_epochs else [100, 300])
    if cfg.model.backbone.type.startswith("ResNet"):
        depth = int(path.stem.removeprefix("resnet").split("_")[0])
        assert cfg.model.backbone.depth == depth
        assert cfg.model.head.in_channels == {18: 512, 50: 2048}[depth]


def test_cifar100_differs_between_depths_in_the_model_only() -> None:
    shallow, deep = (load(ROOT / f"configs/resnet/resnet{depth}_8xb16_cifar100.py") for depth in (18, 50))
    assert set(shallow) == set(deep)
    assert [key for key in shallow if shallow[key] != deep[key]] == ["model"]


@pytest.mark.parametrize("path", [p for p in CONFIGS if "upernet" not in p.name], ids=lambda path: path.stem)
def test_models_build_and_can_be_weighed(path: Path) -> None:
    cfg = load(path)
    pytest.importorskip(cfg.default_scope)
    from mmengine.registry import MODELS, init_default_scope

    from infobatch_mm.losses import LossWeigher, attach_views

    init_default_scope(cfg.default_scope)
    cfg.model.pop("pretrained", None)
    cfg.model.backbone.pop("init_cfg", None)
    attach_views(MODELS.build(cfg.model), LossWeigher()).restore()


def test_camvid_root_comes_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMVID_ROOT", "/somewhere")
    cfg = load(next(path for path in PRUNED if "camvid" in path.name))
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root == "/somewhere"


def test_cifar10_npz_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR10_NPZ", "/somewhere/images.npz")
    cfg = load(next(path for path in PRUNED if "npz" in path.name))
    splits = {"train": "train", "val": "test", "test": "test"}
    for loader, split in splits.items():
        dataset = cfg[f"{loader}_dataloader"].dataset
        assert (dataset.ann_file, dataset.split) == ("/somewhere/images.npz", split)


@pytest.mark.parametrize("infobatch", ["", "-infobatch"])
def test_the_npz_config_trains_on_a_small_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, infobatch: str) -> None:
    pytest.importorskip("mmpretrain")
    from mmengine.runner import Runner

    generator = np.random.default_rng(0)
    arrays = {}
    for split, size in (("train", 40), ("test", 10)):
        arrays[f"{split}_x"] = generator.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
        arrays[f"{split}_y"] = np.arange(size) % 10
    np.savez(tmp_path / "images.npz", **arrays)
    monkeypatch.setenv("CIFAR10_NPZ", str(tmp_path / "images.npz"))
    cfg = Config.fromfile(ROOT / f"configs/resnet/resnet18-tiny_1xb128{infobatch}-30e_cifar10-npz.py")
    cfg.merge_from_dict({"train_dataloader.batch_size": 8, "train_cfg.max_epochs": 3, "param_scheduler.1.end": 3})
    cfg.work_dir, cfg.experiment_name = str(tmp_path / "run"), f"npz{infobatch}"
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.epoch == 3
    assert 0 <= runner.message_hub.get_scalar("val/accuracy/top1").current() <= 100
    names = [runner.train_dataloader.dataset.get_data_info(i)["img_id"] for i in (0, 39)]
    assert names == ["images-train-00000", "images-train-00039"]
    if infobatch:
        summary = json.loads((tmp_path / "run/infobatch_summary.json").read_text())
        assert summary["samples_full"] == 120
        assert 0 < summary["samples_seen"] < 120


def test_unknown_zoo_configs_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="nosuchhost is not installed"):
        config_path("nosuchhost", "a.py")
    with pytest.raises(ValueError, match=r"ships no config 'nosuch\.py'"):
        config_path("mmengine", "nosuch.py")


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]
