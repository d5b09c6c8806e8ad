"""Policies in the configs of MMEngine: by name, by dict, and as an instance, which the host writes down as well."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmseg")
from mmengine.config import Config
from mmengine.runner import Runner

import infobatch_mm.core.policy_registry as registry
from infobatch_mm import InfoBatchPolicy, Plan, PruningPolicy, register_policy
from infobatch_mm.engine import InfoBatchHook
from infobatch_mm.engine.samplers import InfoBatchSampler
from infobatch_mm.scores.ema import EmaScore

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


@pytest.mark.parametrize("score", [dict(type="ema", score_ema=0.5), EmaScore(0.5)], ids=["dict", "instance"])
def test_a_score_is_chosen_in_a_config_and_written_down(scenes: Path, tmp_path: Path, score: Any):
    train(config(scenes, tmp_path, custom_hooks=[dict(type="InfoBatchHook", score=score)]))
    summary = json.loads((tmp_path / "infobatch_summary.json").read_text())
    assert (summary["score"], summary["score_ema"]) == ("ema", 0.5)
    dumped = Config.fromfile(next(tmp_path.glob("*.py")))
    assert dumped.custom_hooks[0].score == dict(type="ema", score_ema=0.5)


def test_a_score_that_asks_for_noise_levels_is_refused_at_once():
    with pytest.raises(ValueError, match="score='timestep' needs the noise level of each sample"):
        InfoBatchHook(score="timestep")


def policies_in(file: Path) -> Any:
    return Config.fromfile(file).custom_hooks[0].policy


def test_a_config_file_with_an_instance_is_run_and_its_dump_runs_alike(scenes: Path, tmp_path: Path):
    """As users do it: from one file, with the host's log of its config, and again from what the run left."""
    register_policy(FirstHalf)
    cfg = config(scenes, tmp_path / "first", log_level="INFO", custom_hooks=[])
    cfg.dump(tmp_path / "base.py")
    (tmp_path / "own.py").write_text(
        "_base_ = ['base.py']\n"  # first: with an import in its place the host reads a config of lazy imports
        f"import {__name__} as own\n"
        "custom_hooks = [dict(type='InfoBatchHook', policy=own.FirstHalf(0.4))]\n"
    )
    first = Config.fromfile(tmp_path / "own.py")
    assert isinstance(first.custom_hooks[0].policy, FirstHalf)
    train(first)
    assert policies_in(tmp_path / "first/own.py") == dict(type="first_half", share=0.4)
    again = Config.fromfile(tmp_path / "first/own.py")
    again.work_dir = str(tmp_path / "again")
    train(again)
    books = [json.loads((tmp_path / run / "infobatch_summary.json").read_text()) for run in ("first", "again")]
    for each in books:
        del each["wall_time_s"]
    assert books[0] == books[1]
    assert {entry["kept"] for entry in books[0]["per_pass"]} >= {8}


def test_an_instance_in_the_sampler_is_written_down_too(scenes: Path, tmp_path: Path):
    cfg = config(scenes, tmp_path, custom_hooks=[])
    cfg.train_cfg.type = "InfoBatchIterLoop"
    cfg.train_dataloader.sampler = dict(type="InfoBatchSampler", policy=FirstHalf(0.4))
    train(cfg)
    assert '"kept": 8' in (tmp_path / "infobatch_summary.json").read_text()
    dumped = Config.fromfile(next(tmp_path.glob("*.py")))
    assert dumped.train_dataloader.sampler.policy == dict(type="first_half", share=0.4)


def test_a_config_that_names_a_class_by_import_is_written_down_as_what_builds_it(tmp_path: Path):
    (tmp_path / "own.py").write_text(
        "from infobatch_mm import InfoBatchPolicy\n"
        "custom_hooks = [dict(policy=dict(type=InfoBatchPolicy, quantile=0.7))]\n"
    )
    Config.fromfile(tmp_path / "own.py", lazy_import=True).dump(tmp_path / "dumped.py")
    assert registry.build_policy(policies_in(tmp_path / "dumped.py")).settings()["quantile"] == 0.7


def test_the_callers_dict_stays_as_it_is():
    given = Config(dict(policy=QUANTILE)).policy
    InfoBatchHook(policy=given)
    InfoBatchSampler(range(10), policy=given)
    assert given == QUANTILE


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


@pytest.mark.parametrize(
    ("hook", "sampler", "message"),
    [
        (dict(prune_ratio=0.5), dict(policy=QUANTILE), r"prune_ratio=0\.5 and policy=dict\(prune_ratio=0\.4, \.\.\.\)"),
        (dict(policy=QUANTILE), dict(prune_ratio=0.3), r"prune_ratio=0\.3 and policy=dict\(prune_ratio=0\.4, \.\.\.\)"),
        (
            dict(policy=FirstHalf(0.3)),
            dict(policy=FirstHalf(0.4)),
            r"share=0\.3\), but InfoBatchSampler .*share=0\.4\)",
        ),
        (dict(policy=FirstHalf(0.3)), dict(policy="random"), r"policy=dict\(type='first_half'.*policy='random'"),
    ],
    ids=["dict in the sampler", "dict in the hook", "two instances", "instance and name"],
)
def test_what_hook_and_sampler_say_in_different_forms_must_not_differ(
    scenes: Path, tmp_path: Path, hook: dict[str, Any], sampler: dict[str, Any], message: str
):
    cfg = config(scenes, tmp_path, custom_hooks=[dict(type="InfoBatchHook", **hook)])
    cfg.train_dataloader.sampler = dict(type="InfoBatchSampler", **sampler)
    with pytest.raises(ValueError, match=message):
        Runner.from_cfg(cfg).train()


@pytest.mark.parametrize(
    ("hook", "sampler"),
    [
        (dict(policy="infobatch"), dict(policy=dict(type="infobatch"), prune_ratio=0.4)),
        (dict(policy=InfoBatchPolicy(0.4)), dict(policy=InfoBatchPolicy(0.4))),
        (dict(policy=InfoBatchPolicy(0.4)), dict(prune_ratio=0.4)),
        (dict(prune_ratio=0.4), dict(policy=dict(type="infobatch"))),
    ],
    ids=["name and dict", "two instances", "instance and ratio", "ratio and dict"],
)
def test_what_hook_and_sampler_say_alike_in_different_forms_is_taken(
    scenes: Path, tmp_path: Path, hook: dict[str, Any], sampler: dict[str, Any]
):
    cfg = config(scenes, tmp_path, **{"train_cfg.max_iters": 12})
    cfg.custom_hooks = [dict(type="InfoBatchHook", **hook)]
    cfg.train_dataloader.sampler = dict(type="InfoBatchSampler", **sampler)
    train(cfg)
    assert '"prune_ratio": 0.4' in (tmp_path / "infobatch_summary.json").read_text()


def test_an_argument_beside_an_instance_must_not_differ_from_it():
    with pytest.raises(ValueError, match=r"prune_ratio=0\.5 and policy=dict\(prune_ratio=0\.3, \.\.\.\)"):
        InfoBatchHook(prune_ratio=0.5, policy=InfoBatchPolicy(0.3))
    InfoBatchHook(prune_ratio=0.3, policy=InfoBatchPolicy(0.3))
    InfoBatchHook(prune_ratio=0.5, policy=FirstHalf())  # which takes none
