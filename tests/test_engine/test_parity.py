"""With ``policy='none'`` a run is the host's own, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mmseg")

from .toy import EPOCHS, config, train


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
