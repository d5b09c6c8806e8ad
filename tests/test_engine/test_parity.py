"""With ``policy='none'`` a run is the host's own, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mmseg")

import torch
from mmengine.config import Config

from .toy import EPOCHS, config, train

DEMO = Path(__file__).parents[2] / "configs/demo/fcn_r18-tiny_1xb8-1k_demo-96x96.py"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loop", ["iter", "epoch"])
def test_policy_none_changes_nothing(scenes: Path, tmp_path: Path, loop: str, workers: int) -> None:
    overrides = dict(EPOCHS) if loop == "epoch" else {"train_cfg.max_iters": 40}
    overrides["train_dataloader.num_workers"] = workers
    overrides["train_dataloader.persistent_workers"] = bool(workers)
    _, host = train(config(scenes, tmp_path / "host", custom_hooks=[], **overrides))
    hooks = [dict(type="InfoBatchHook", policy="none")]
    _, ours = train(config(scenes, tmp_path / "ours", custom_hooks=hooks, **overrides))
    assert ours.names == host.names
    assert ours.inputs == host.inputs
    assert ours.losses == host.losses
    assert ours.lrs == host.lrs
    assert ours.max_iters == host.max_iters
    assert len(ours.indices) == len(ours.names)


def test_r_zero_visits_everything_on_the_hosts_schedule(scenes: Path, tmp_path: Path) -> None:
    _, host = train(config(scenes, tmp_path / "host", custom_hooks=[], **EPOCHS))
    hooks = [dict(type="InfoBatchHook", prune_ratio=0.0)]
    _, ours = train(config(scenes, tmp_path / "ours", custom_hooks=hooks, **EPOCHS))
    assert ours.lrs == host.lrs
    for start in range(0, 36, 6):
        assert sorted(sum(ours.names[start : start + 6], [])) == sorted(sum(host.names[start : start + 6], []))


@pytest.mark.slow
def test_policy_none_is_bit_equal_over_150_iterations_of_the_demo(tmp_path: Path) -> None:
    from infobatch_mm.demo.street import draw_dataset

    root = draw_dataset(tmp_path / "demo")
    states, records = [], []
    for name, hooks in (("host", []), ("ours", [dict(type="InfoBatchHook", policy="none")])):
        cfg = Config.fromfile(DEMO)
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            loader.dataset.data_root = str(root)
        cfg.train_cfg.update(max_iters=150, val_interval=50)
        cfg.work_dir, cfg.custom_hooks = str(tmp_path / name), hooks
        runner, recorder = train(cfg)
        states.append(runner.model.state_dict())
        records.append((recorder.names, recorder.inputs, recorder.losses, recorder.lrs))
    assert records[0] == records[1]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
