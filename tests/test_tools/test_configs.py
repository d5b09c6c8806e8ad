"""The configs that users run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmengine")

from mmengine.config import Config

from infobatch_mm.zoo import config_path

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in ROOT.glob("configs/*/*.py") if path.parent.name != "_base_")
PRUNED = [path for path in CONFIGS if "-infobatch" in path.name]
PRETRAINING = [path for path in CONFIGS if path.name.startswith("mae_vit")]
FINE_TUNING = [path for path in CONFIGS if path.parent.name == "mae" and path not in PRETRAINING]


def load(path: str | Path) -> Config:
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


LABELLED = [p for p in CONFIGS if re.search("_(cifar100?|in1k)$", p.stem) and p not in PRETRAINING]


@pytest.mark.parametrize("path", LABELLED, ids=lambda path: path.stem)
def test_cifar_and_imagenet_configs_are_the_real_ones(path: Path) -> None:
    cfg = load(path)
    data_set = path.stem.rsplit("_", 1)[-1]
    names = {"cifar10": ("CIFAR10", 10, 200), "cifar100": ("CIFAR100", 100, 200), "in1k": ("ImageNet", 1000, None)}
    data_type, num_classes, max_epochs = names[data_set]
    assert {cfg[f"{split}_dataloader"].dataset.type for split in ("train", "val", "test")} == {data_type}
    assert cfg.model.head.num_classes == num_classes
    named = re.search(r"-(\d+)e_", path.stem)
    assert cfg.train_cfg.max_epochs in ([int(named[1])] if named else [max_epochs] if max_epochs else [100, 300])
    if cfg.model.backbone.type.startswith("ResNet"):
        depth = int(path.stem.removeprefix("resnet").split("_")[0])
        assert cfg.model.backbone.depth == depth
        assert cfg.model.head.in_channels == {18: 512, 50: 2048}[depth]


@pytest.mark.parametrize("path", [p for p in PRETRAINING if "_in1k" in p.name], ids=lambda path: path.stem)
def test_pretraining_configs_are_the_real_ones(path: Path) -> None:
    cfg = load(path)
    size, epochs = re.search(r"vit-(\w+)-p16.*-(\d+)e_", path.stem).groups()
    assert (cfg.model.type, cfg.model.backbone.arch, cfg.model.head.norm_pix) == ("MAE", size[0], True)
    assert cfg.model.neck.embed_dim == {"base": 768, "large": 1024}[size]
    assert (cfg.train_dataloader.dataset.type, cfg.train_dataloader.batch_size) == ("ImageNet", 512)
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[-1].end == int(epochs)


@pytest.mark.parametrize("path", FINE_TUNING, ids=lambda path: path.stem)
def test_a_fine_tuning_starts_where_a_pruned_pretraining_ends(path: Path) -> None:
    folder, checkpoint = Path(load(path).model.backbone.init_cfg.checkpoint).parts[-2:]
    (run,) = (each for each in PRETRAINING if each.stem == folder)
    assert run in PRUNED
    assert checkpoint == f"epoch_{load(run).train_cfg.max_epochs}.pth"


def test_cifar100_differs_between_depths_in_the_model_only() -> None:
    shallow, deep = (load(ROOT / f"configs/resnet/resnet{depth}_8xb16_cifar100.py") for depth in (18, 50))
    assert set(shallow) == set(deep)
    assert [key for key in shallow if shallow[key] != deep[key]] == ["model"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_models_build_and_can_be_weighed(path: Path) -> None:
    cfg = load(path)
    pytest.importorskip(cfg.default_scope)
    import torch
    from mmengine.registry import MODELS, init_default_scope

    from infobatch_mm.losses import LossWeigher, attach_views

    init_default_scope(cfg.default_scope)
    cfg.model.pop("pretrained", None)
    cfg.model.backbone.pop("init_cfg", None)
    # the large ones without their parameters, which would only cost time and memory
    with torch.device("meta" if path.parent.name in ("mae", "upernet") else "cpu"):
        model = MODELS.build(cfg.model)
    attach_views(model, LossWeigher()).restore()


@pytest.mark.parametrize("path", [p for p in FINE_TUNING if p not in PRUNED], ids=lambda path: path.stem)
def test_every_weight_of_a_pretraining_arrives_and_computes_the_same(path: Path, tmp_path: Path) -> None:
    cfg = load(path)
    for host in (cfg.default_scope, "mmpretrain"):
        pytest.importorskip(host)
    import torch
    from mmengine.registry import MODELS, DefaultScope

    backbone = cfg.model.backbone
    pretraining = load(path.with_name(f"{Path(backbone.init_cfg.checkpoint).parent.name}.py")).model
    small = dict(embed_dims=24, num_layers=24 if "large" in path.name else 12, num_heads=3, feedforward_channels=48)
    backbone.arch = pretraining.backbone.arch = small
    pretraining.neck.embed_dim = 24
    backbone.init_cfg.checkpoint = str(tmp_path / "epoch_1.pth")
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        pretrained = MODELS.build(pretraining)
    for parameter in pretrained.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save(dict(state_dict=pretrained.state_dict()), tmp_path / "epoch_1.pth")
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        encoder = MODELS.build(backbone)
        encoder.init_weights()
    # the encoder of the pre-training, which masks nothing, and as an extractor of the same features
    same = {key: getattr(encoder, key) for key in ("img_size", "out_indices", "out_type", "final_norm")}
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        reference = MODELS.build({**pretraining.backbone, **same})

    encoded, arrived = pretrained.backbone.state_dict(), encoder.state_dict()
    reference.load_state_dict(dict(encoded), strict=False)
    expected = {**encoded, "pos_embed": reference.pos_embed}
    for name in set(encoded) & set(arrived):
        assert torch.equal(arrived[name], expected[name]), name
    # what the hosts' own configs leave out, and what they begin anew
    assert set(encoded) - set(arrived) <= {"ln1.weight", "ln1.bias"}
    assert all(re.search(r"^ln2\.|gamma_|relative_position", name) for name in set(arrived) - set(encoded))

    for name, parameter in encoder.named_parameters():
        if "relative_position" in name:
            assert parameter.abs().max() < 0.1  # noise, where MMSegmentation's own is zero
            torch.nn.init.zeros_(parameter)
    for module in (encoder, reference):
        module.eval()  # answers None
    with torch.no_grad():
        images = torch.randn(2, 3, *encoder.img_size)
        for ours, theirs in zip(encoder(images), reference(images, mask=None), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_segmentor_on_maes_encoder_is_trained_as_mmsegmentations_own() -> None:
    """Parameters, learning rates by layer and weight decays are those of the host's config of this name."""
    name = "mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py"
    for host in ("mmseg", "mmpretrain"):
        pytest.importorskip(host)
    import torch
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import MODELS, DefaultScope

    def groups(path: str | Path, device: str) -> dict:
        cfg = load(path)
        cfg.model.pretrained = None
        with DefaultScope.overwrite_default_scope("mmseg"), torch.device(device):
            model = MODELS.build(cfg.model)
            wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return {
            names[id(parameter)]: (parameter.shape, group["lr"], group["weight_decay"])
            for group in wrapper.optimizer.param_groups
            for parameter in group["params"]
        }

    ours = groups(ROOT / "configs/mae" / name, "meta")
    assert ours == groups(config_path("mmseg", f"mae/{name}"), "cpu")
    assert len({group[1:] for group in ours.values()}) == 28


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
        assert summary["visits_full"] == 120
        assert 0 < summary["visits"] < 120


@pytest.mark.slow
def test_the_demo_pretrains_and_then_learns_to_segment(scenes: Path, tmp_path: Path) -> None:
    for host in ("mmseg", "mmpretrain"):
        pytest.importorskip(host)
    import torch
    from mmengine.runner import Runner

    def run(name: str, **overrides: object) -> Runner:
        cfg = Config.fromfile(ROOT / f"configs/mae/{name}.py")
        cfg.merge_from_dict({"train_dataloader.batch_size": 4, "train_dataloader.dataset.data_root": str(scenes)})
        cfg.merge_from_dict(overrides)
        cfg.work_dir, cfg.experiment_name = str(tmp_path / name), name
        runner = Runner.from_cfg(cfg)
        runner.train()
        summary = json.loads((tmp_path / name / "infobatch_summary.json").read_text())
        assert 0 < summary["visits"] < summary["visits_full"]
        return runner

    name = "mae_vit-tiny-p8_1xb64-coslr-infobatch-100e_demo-64px"
    ends = {"param_scheduler.0.end": 1, "param_scheduler.1.begin": 1, "param_scheduler.1.end": 6}
    encoder = run(name, **{"train_cfg.max_epochs": 6, **ends}).model.backbone
    # without a learning rate it ends with the encoder that it began with
    frozen = {"optim_wrapper.optimizer.lr": 0.0, "optim_wrapper.optimizer.weight_decay": 0.0}
    frozen["model.backbone.init_cfg.checkpoint"] = str(tmp_path / name / "epoch_6.pth")
    frozen.update({f"{split}_dataloader.dataset.data_root": str(scenes) for split in ("val", "test")})
    ends = {"param_scheduler.0.end": 3, "param_scheduler.1.begin": 3, "param_scheduler.1.end": 30}
    loop = {"train_cfg.max_iters": 30, "train_cfg.val_interval": 30}
    segmentor = run("fcn_mae-vit-tiny-p8_1xb16-infobatch-450_demo-64x64", **frozen, **ends, **loop).model
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, segmentor.backbone.state_dict()[key]), key


def test_unknown_zoo_configs_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="nosuchhost is not installed"):
        config_path("nosuchhost", "a.py")
    with pytest.raises(ValueError, match=r"ships no config 'nosuch\.py'"):
        config_path("mmengine", "nosuch.py")


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def test_the_page_of_configs_is_the_one_that_its_tool_writes() -> None:
    found = subprocess.run(
        [sys.executable, "-c", "import config_table; print(config_table.page(), end='')"],
        cwd=ROOT / "tools",
        capture_output=True,
        text=True,
        check=True,
    )
    assert (ROOT / "configs/README.md").read_text() == found.stdout
    for line in found.stdout.splitlines():
        for link in re.findall(r"\]\(([^)]+)\)", line):
            assert (ROOT / "configs" / link).is_file()
