"""Policies in the configs of MMEngine: by name, by dict, and as an instance, which the host writes down as well."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmseg")
from mmengine.config import Config
from mmengine.runner import Runner

import infobatch_mm.core.policy_registry as registry
from infobatch_mm import Plan, PruningPolicy, register_policy
from infobatch_mm.engine import InfoBatchHook
from infobatch_mm.engine.samplers import InfoBatchSampler

from .toy import config, train

QUANTILE = dict(type="infobatch", prune_ratio=0.4, quantile=0.8)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))
    yield


class FirstHalf(PruningPolicy):
    name = "first_half"

    def __init__(self, share: float = 0.5) -> None:
        self.share = share

    def is_active(self, progress: float) -> bool:
        return progress < 0.9

    def draw(
        self, scores: torch.Tensor, seen: torch.Tensor, generator: torch.Generator, multiple_of: int
    ) -> Plan | None:
        kept = int(len(scores) * self.share) // multiple_of * multiple_of
        order = torch.randperm(len(scores), generator=generator)[:kept]
        return Plan(order, torch.full((kept,), len(scores) / kept), pruned=True)

    def settings(self) -> dict[str, Any]:
        return {"policy": self.name, "share": self.share}


def hooked(scenes: Path, folder: Path, policy: Any, **arguments: Any) -> Config:
    return config(scenes, folder, custom_hooks=[dict(type="InfoBatchHook", policy=policy, **arguments)])


def test_a_dict_chooses_policy_and_arguments(scenes: Path, tmp_path: Path):
    runner, _ = train(hooked(scenes, tmp_path, QUANTILE, delta=0.75))
    books = next(hook for hook in runner.hooks if isinstance(hook, InfoBatchHook))
    assert books._given["policy"] == QUANTILE
    summary = (tmp_path / "infobatch_summary.json").read_text()
    assert '"prune_ratio": 0.4' in summary and '"quantile": 0.8' in summary and '"delta": 0.75' in summary


def test_a_registered_policy_is_named_in_a_config(scenes: Path, tmp_path: Path):
    register_policy(FirstHalf)
    train(hooked(scenes, tmp_path, dict(type="first_half", share=0.4)))
    summary = (tmp_path / "infobatch_summary.json").read_text()
    assert '"policy": "first_half"' in summary and '"kept": 8' in summary


def test_an_instance_in_a_config_trains_and_is_written_down_as_what_builds_it(scenes: Path, tmp_path: Path):
    register_policy(FirstHalf)
    runner, _ = train(hooked(scenes, tmp_path, FirstHalf(0.4)))
    assert '"policy": "first_half"' in (tmp_path / "infobatch_summary.json").read_text()
    dumped = Config.fromfile(next(tmp_path.glob("*.py")))
    assert dumped.custom_hooks[0].policy == dict(type="first_half", share=0.4)
    again = registry.build_policy(dumped.custom_hooks[0].policy)
    assert again.settings() == FirstHalf(0.4).settings()
    assert "dict(type='first_half'" in runner.cfg.pretty_text.replace("\n", "").replace("  ", "")


@pytest.mark.parametrize("lazy", [False, True])
def test_a_config_file_may_make_an_instance_or_name_a_class(scenes: Path, tmp_path: Path, lazy: bool):
    made = "dict(type=InfoBatchPolicy, prune_ratio=0.3)" if lazy else "InfoBatchPolicy(0.3)"
    file = tmp_path / "own.py"
    file.write_text(f"from infobatch_mm import InfoBatchPolicy\nhook = dict(policy={made})\n")
    cfg = Config.fromfile(file, lazy_import=lazy)
    train(hooked(scenes, tmp_path / "run", cfg.hook.policy))
    assert '"prune_ratio": 0.3' in (tmp_path / "run/infobatch_summary.json").read_text()


def test_what_a_dumped_config_names_must_be_registered(scenes: Path, tmp_path: Path):
    cfg = hooked(scenes, tmp_path, FirstHalf(0.4))
    text = Config(dict(policy=cfg.custom_hooks[0].policy)).pretty_text
    with pytest.raises(ValueError, match=r"unknown policy 'first_half'.*register_policy.*custom_imports"):
        Runner.from_cfg(hooked(scenes, tmp_path, Config.fromstring(text, ".py").policy))


def test_a_class_is_refused_by_name(scenes: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="policy=FirstHalf is a class: make an instance"):
        InfoBatchHook(policy=FirstHalf)  # type: ignore[arg-type]


def test_hook_dict_and_sampler_must_agree(scenes: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"prune_ratio=0.5 and policy=dict\(prune_ratio=0.4, ...\): set it in one"):
        InfoBatchHook(prune_ratio=0.5, policy=QUANTILE)
    InfoBatchHook(prune_ratio=0.4, policy=QUANTILE)
    InfoBatchSampler(range(10), policy=QUANTILE)
    cfg = hooked(scenes, tmp_path, QUANTILE)
    cfg.train_dataloader.sampler = dict(type="InfoBatchSampler", policy=dict(QUANTILE, quantile=0.7))
    with pytest.raises(ValueError, match=r"InfoBatchHook has policy=.*but InfoBatchSampler has policy="):
        Runner.from_cfg(cfg).train()
