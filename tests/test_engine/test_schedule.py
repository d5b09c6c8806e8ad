"""Learning rates and momenta of a pruned run are the unpruned run's at every pass boundary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmseg")

from .toy import EPOCHS, config, train

N, B = 22, 4
ITER_SCHEDULERS: dict[str, list[dict[str, Any]]] = {
    "poly": [dict(type="PolyLR", power=0.9, eta_min=1e-4, begin=0, end=33)],
    "warm-up then poly": [
        dict(type="LinearLR", start_factor=0.1, begin=0, end=9),
        dict(type="PolyLR", power=0.9, eta_min=1e-4, begin=9, end=33),
    ],
    "warm-up then steps": [
        dict(type="LinearLR", start_factor=0.1, begin=0, end=7),
        dict(type="MultiStepLR", milestones=[14, 22, 28]),
    ],
    "cosine": [dict(type="CosineAnnealingLR", T_max=33, begin=0, end=33)],
    "one cycle": [dict(type="OneCycleLR", eta_max=0.3, total_steps=33)],
    "restarts": [dict(type="CosineRestartLR", periods=[11, 22], restart_weights=[1, 0.5], eta_min=1e-4)],
    "exponential": [dict(type="ExponentialLR", gamma=0.9)],
    "momentum": [
        dict(type="CosineAnnealingLR", T_max=33, begin=0, end=33),
        dict(type="LinearMomentum", start_factor=0.5, begin=0, end=12),
    ],
}
EPOCH_SCHEDULERS: dict[str, list[dict[str, Any]]] = {
    "by epoch": [dict(type="PolyLR", power=0.9, eta_min=1e-4, by_epoch=True, begin=0, end=6)],
    "converted": [
        dict(type="LinearLR", start_factor=0.1, by_epoch=True, begin=0, end=2, convert_to_iter_based=True),
        dict(type="CosineAnnealingLR", T_max=4, by_epoch=True, begin=2, end=6, convert_to_iter_based=True),
    ],
    "mixed": [
        dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=9),
        dict(type="MultiStepLR", by_epoch=True, milestones=[2, 4]),
    ],
    "one cycle converted": [
        dict(type="OneCycleLR", eta_max=0.3, total_steps=6, by_epoch=True, convert_to_iter_based=True)
    ],
    "momentum": [dict(type="CosineAnnealingMomentum", T_max=6, by_epoch=True, convert_to_iter_based=True)],
}


def short(schedulers: dict[str, Any], *names: str) -> list[Any]:
    """Some of them for the default suite: the hook knows no kinds, only by iteration, by epoch, and how many."""
    return [pytest.param(name, marks=[] if name in names else pytest.mark.slow) for name in schedulers]


@pytest.mark.parametrize("name", short(ITER_SCHEDULERS, "warm-up then poly", "one cycle"))
def test_iteration_loop_equals_the_host_at_every_pass_boundary(scenes: Path, tmp_path: Path, name: str) -> None:
    schedulers = [dict(s, by_epoch=False) for s in ITER_SCHEDULERS[name]]
    host_runner, host = train(config(scenes, tmp_path / "host", custom_hooks=[], param_scheduler=schedulers))
    runner, ours = train(config(scenes, tmp_path / "ours", param_scheduler=schedulers))
    # after pass p the host has made floor(p * N / B) iterations
    steps = [min(p * N, 33 * B) // B for p in range(1, 7)]
    expected = [*host.lrs, None]
    at_boundaries = [lrs for lrs in ours.boundary_lrs]
    assert at_boundaries[:-1] == pytest.approx([expected[s] for s in steps[:-1]], rel=1e-12)
    # neither one step short nor one beyond
    assert [s.last_step for s in runner.param_schedulers] == [s.last_step for s in host_runner.param_schedulers]
    assert len(ours.lrs) < len(host.lrs)
    assert ours.lrs[0] == host.lrs[0]
    assert ours.momenta[-1] == pytest.approx(host.momenta[-1], rel=0.1)


@pytest.mark.parametrize("name", short(EPOCH_SCHEDULERS, "mixed", "momentum"))
def test_epoch_loop_equals_the_host_at_every_pass_boundary(scenes: Path, tmp_path: Path, name: str) -> None:
    overrides = {**EPOCHS, "param_scheduler": EPOCH_SCHEDULERS[name]}
    _, host = train(config(scenes, tmp_path / "host", custom_hooks=[], **overrides))
    _, ours = train(config(scenes, tmp_path / "ours", **overrides))
    starts = [i for i, batch in enumerate(ours.batch_idx) if batch == 0]
    assert len(starts) == 6
    assert [ours.lrs[i] for i in starts] == [host.lrs[6 * p] for p in range(6)]
    assert [ours.momenta[i] for i in starts] == [host.momenta[6 * p] for p in range(6)]


def test_steps_are_spread_evenly_within_a_pass(scenes: Path, tmp_path: Path) -> None:
    _, ours = train(config(scenes, tmp_path))
    drops = [before - after for before, after in zip(ours.lrs, ours.lrs[1:], strict=False)]
    per_step = (0.1 - 1e-4) / 33
    assert all(-1e-12 <= drop < 2.6 * per_step for drop in drops)
