"""The zoo benchmark over a handful of folders; of MMSegmentation: pytest -m slow tests/test_tools/test_zoo.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def walk(host: str, folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    command = [sys.executable, ROOT / "benchmarks/zoo.py", "--host", host, "--json", folder / "zoo.json", *names]
    subprocess.run(list(map(str, command)), check=True, cwd=folder)
    return json.loads((folder / "zoo.json").read_text())["folders"]


def assert_exact(folder: dict[str, Any]) -> None:
    assert folder["status"] == "ok", folder["reason"]
    assert folder["rel_err_ones"] <= 1e-6
    assert folder["rel_err_random"] <= 1e-4
    assert folder["step_ratio"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_handful_of_segmentors_is_weighed_exactly(tmp_path: Path) -> None:
    pytest.importorskip("mmseg")
    paths = {"fcn": "fast", "encnet": "fast", "danet": "fast", "knet": "fast", "stdc": "fast", "pidnet": "universal"}
    folders = walk("mmseg", tmp_path, list(paths))
    assert {name: folder["path"] for name, folder in folders.items()} == paths
    for folder in folders.values():
        assert_exact(folder)


@pytest.mark.slow
def test_classifiers_with_and_without_mixing_are_weighed_exactly(tmp_path: Path) -> None:
    pytest.importorskip("mmpretrain")
    folders = walk("mmpretrain", tmp_path, ["lenet", "deit", "glip"])
    assert folders.pop("glip")["status"] == "not_classification"
    assert {name: folder["mixing"] for name, folder in folders.items()} == {"lenet": None, "deit": "Mixup, CutMix"}
    for folder in folders.values():
        assert folder["path"] == "fast"
        assert_exact(folder)


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark as a module, where MMPretrain's models are built; it times nothing."""
    pytest.importorskip("mmpretrain")
    from mmengine.registry import DefaultScope

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = import_module("zoo")
    monkeypatch.setattr(module, "step_ratio", lambda *args: 1.0)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        yield module


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A folder with a small classifier whose images are mixed."""
    model: dict[str, Any] = dict(type="ImageClassifier", backbone=dict(type="LeNet5", num_classes=-1))
    model["neck"] = dict(type="GlobalAveragePooling")
    model["head"] = dict(type="LinearClsHead", in_channels=120, num_classes=7, loss=dict(type="LabelSmoothLoss"))
    model["head"]["loss"]["label_smooth_val"] = 0.1
    model["train_cfg"] = dict(augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)])
    folder = tmp_path / "lenet"
    folder.mkdir()
    preprocessor = dict(num_classes=7, mean=[0.0], std=[1.0])
    (folder / "lenet_in1k.py").write_text(f"model = {model}\ndata_preprocessor = {preprocessor}\n")
    return folder


def test_a_mixed_image_that_is_weighed_otherwise_fails(
    zoo: ModuleType, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infobatch_mm.losses import LossWeigher

    host = import_module("zoo_mmpretrain").HOST
    right = zoo.check_folder(host, classifier)
    assert (right.status, right.failed) == ("ok", False), right.reason
    begin = LossWeigher.begin

    def own_weight(self: LossWeigher, weights: torch.Tensor, pruned: bool) -> None:
        begin(self, weights, pruned, pair_weights=lambda own, other: own)

    monkeypatch.setattr(LossWeigher, "begin", own_weight)
    wrong = zoo.check_folder(host, classifier)
    assert (wrong.status, wrong.failed) == ("refused", True)
    assert wrong.rel_err_ones == 0
    assert "rel_err_random" in wrong.reason


def test_a_classifier_that_cannot_be_weighed_or_built_is_reported(zoo: ModuleType, classifier: Path) -> None:
    host = import_module("zoo_mmpretrain").HOST
    config = classifier / "lenet_in1k.py"
    known = config.read_text()
    config.write_text(f"{known}model['head']['loss'] = dict(type='CrossEntropyLoss', reduction='none')\n")
    result = zoo.check_folder(host, classifier)
    assert (result.status, result.config) == ("refused", "lenet/lenet_in1k.py")
    assert "reduction='none'" in result.reason
    config.write_text(f"{known}model['head']['in_channels'] = 121\n")
    result = zoo.check_folder(host, classifier)
    assert (result.status, result.path) == ("not_built", None)
    assert result.reason.startswith("RuntimeError: trains at no size up to 384: RuntimeError: ")
    config.write_text("model = dict(type='TimmClassifier', model_name='resnet18')\n")
    result = zoo.check_folder(host, classifier)
    assert result.status == "not_built"
    if find_spec("timm") is None:
        assert result.reason == "needs timm"


def unlabelled(folder: Path, name: str, model: dict[str, Any], *transforms: dict[str, Any]) -> Path:
    """A folder with one config that trains on random crops of 112 x 112, masked or doubled by the transforms."""
    crop = [dict(type="LoadImageFromFile"), dict(type="RandomResizedCrop", scale=112)]
    pipeline = [*crop, *transforms, dict(type="PackInputs")]
    loader = dict(dataset=dict(pipeline=pipeline))
    (folder / name).mkdir()
    (folder / name / f"{name}_tiny_in1k.py").write_text(f"model = {model}\ntrain_dataloader = {loader}\n")
    return folder / name


@pytest.fixture
def maskfeat(tmp_path: Path) -> Path:
    """A masked-image model whose masks come with the images."""
    arch = dict(embed_dims=24, num_layers=2, num_heads=2, feedforward_channels=48)
    model = dict(type="MaskFeat", backbone=dict(type="MaskFeatViT", arch=arch, img_size=112, patch_size=8))
    model["neck"] = dict(type="LinearNeck", in_channels=24, out_channels=27, norm_cfg=None)
    model["head"] = dict(type="MIMHead", loss=dict(type="PixelReconstructionLoss", criterion="L2"))
    model["target_generator"] = dict(type="HOGGenerator", nbins=9, pool=8, gaussian_window=16)
    masks = dict(type="BEiTMaskGenerator", input_size=14, num_masking_patches=78, min_num_patches=15)
    return unlabelled(tmp_path, "maskfeat", model, masks)


def test_self_supervised_models_are_weighed_by_their_masked_patches(
    zoo: ModuleType, maskfeat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infobatch_mm.losses import LossWeigher

    host = import_module("zoo_mmpretrain_selfsup").HOST
    right = zoo.check_folder(host, maskfeat)
    assert (right.status, right.path, right.targets) == ("ok", "fast", None), right.reason
    begin = LossWeigher.begin
    monkeypatch.setattr(LossWeigher, "begin", lambda self, weights, pruned: begin(self, weights.flip(0), pruned))
    wrong = zoo.check_folder(host, maskfeat)
    assert (wrong.status, wrong.failed, wrong.rel_err_ones) == ("refused", True, 0)
    assert "rel_err_random" in wrong.reason


def test_the_oracles_parts_add_up_to_the_hosts_loss_under_uneven_masks(zoo: ModuleType, maskfeat: Path) -> None:
    host = import_module("zoo_mmpretrain_selfsup").HOST
    case = import_module("zoo_host").build_smallest(host, host.model_config(host.cheapest_config(maskfeat)))
    for i, sample in enumerate(case.batch["data_samples"]):
        sample.mask[: 3 * i] = 0
    loss, _ = case.run()
    parts = []
    for one in torch.eye(4):
        with host.oracle(case.model, one):
            parts.append(case.run()[0])
    assert sum(parts) == pytest.approx(loss, rel=1e-6)
    assert parts == sorted(parts, reverse=True)
    assert max(zoo.errors_from(case, torch.tensor([0.3, 2.0, 1.0, 0.7]), zoo.Result(), seed=0)) <= 1e-6


def test_a_contrastive_model_is_refused_and_no_failure(zoo: ModuleType, classifier: Path, tmp_path: Path) -> None:
    host = import_module("zoo_mmpretrain_selfsup").HOST
    model = dict(type="SimCLR", backbone=dict(type="ResNet", depth=18, stem_channels=8, base_channels=8))
    model["neck"] = dict(type="NonLinearNeck", in_channels=64, hid_channels=8, out_channels=8)
    model["head"] = dict(type="ContrastiveHead", loss=dict(type="CrossEntropyLoss"))
    views = dict(type="MultiView", num_views=2, transforms=[[dict(type="RandomFlip", prob=0.5)]])
    refused = zoo.check_folder(host, unlabelled(tmp_path, "simclr", model, views))
    assert (refused.status, refused.failed) == ("refused", False), refused.reason
    assert "ContrastiveHead" in refused.reason
    assert zoo.check_folder(host, classifier).status == "not_self_supervised"
