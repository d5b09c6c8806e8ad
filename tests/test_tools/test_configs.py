"""The configs that users run."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mmengine")

from mmengine.config import Config

from infobatch_mm.zoo import config_path

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in ROOT.glob("configs/*/*.py") if path.parent.name != "_base_")
PRUNED = [path for path in CONFIGS if "-infobatch-" in path.name]


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


@pytest.mark.parametrize("path", [p for p in CONFIGS if "upernet" not in p.name], ids=lambda path: path.stem)
def test_models_build_and_can_be_weighed(path: Path) -> None:
    pytest.importorskip("mmseg")
    from mmengine.registry import MODELS, init_default_scope

    from infobatch_mm.losses import LossWeigher, attach_views

    init_default_scope("mmseg")
    cfg = load(path)
    cfg.model.pop("pretrained", None)
    cfg.model.backbone.pop("init_cfg", None)
    attach_views(MODELS.build(cfg.model), LossWeigher()).restore()


def test_camvid_root_comes_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMVID_ROOT", "/somewhere")
    cfg = load(next(path for path in PRUNED if "camvid" in path.name))
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root == "/somewhere"


def test_unknown_zoo_configs_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="nosuchhost is not installed"):
        config_path("nosuchhost", "a.py")
    with pytest.raises(ValueError, match=r"ships no config 'nosuch\.py'"):
        config_path("mmengine", "nosuch.py")


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]
