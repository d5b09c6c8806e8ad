"""Every policy by its name, in a training loop, in a script on accelerate and in a run of MMEngine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from infobatch_mm import InfoBatch
from infobatch_mm.core import read_scores
from infobatch_mm.core.policy_registry import registered

NAMES = [name for name, each in sorted(registered().items()) if each.__module__.startswith("infobatch_mm.")]
EPOCHS, BATCH = 9, 4


def policy_of(name: str, num_samples: int) -> dict[str, Any]:
    """With what a run of so few passes takes to prune anything."""
    own: dict[str, dict[str, Any]] = {
        "auto": dict(bar=1.0),
        "class_budgets": dict(classes=[place % 3 for place in range(num_samples)]),
        "ies": dict(tolerance=5.0, min_visits=2),
        "kakurenbo": dict(prune_ratio=0.9, tau=0.5),
        "progressive_dropout": dict(tau=0.05),
    }
    return dict(type=name, **own.get(name, {}))


def problem(num_samples: int) -> list[tuple[torch.Tensor, int]]:
    """Points of two classes that a line tells apart, but for a few."""
    source = torch.Generator().manual_seed(0)
    points = torch.randn(num_samples, 2, generator=source)
    labels = (points.sum(1) + 0.3 * torch.randn(num_samples, generator=source) > 0).long()
    return list(zip(points, labels.tolist(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_in_a_loop(name: str) -> None:
    data, model = problem(50), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    infobatch = InfoBatch(50, EPOCHS, policy=policy_of(name, 50), delta=None, batch_size=BATCH, seed=1)
    loader = infobatch.loader(data)
    for _ in range(EPOCHS):
        for index, (points, labels) in loader:
            logits = model(points)
            loss = infobatch.weigh(functional.cross_entropy(logits, labels, reduction="none"), index, outputs=logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    summary = infobatch.summary()
    pruned = [entry for entry in summary["per_pass"] if entry["kept"] < 48]
    assert summary["policy"] == name and summary["passes_done"] == EPOCHS
    assert summary["score"] == (registered()[name].score or "raw")
    assert all(entry["kept"] % BATCH == 0 for entry in pruned)
    assert bool(pruned) == (name != "none") and (summary["saved_ratio"] > 0.02) == (name != "none")
    assert all(torch.isfinite(each).all() for each in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_in_a_script_on_accelerate(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    from launching import forget_accelerators

    from infobatch_mm.accelerated import AcceleratedInfoBatch

    forget_accelerators()
    accelerator, model = accelerate.Accelerator(cpu=True), nn.Linear(2, 2)
    loader = DataLoader(problem(48), BATCH, shuffle=True)
    infobatch = AcceleratedInfoBatch(accelerator, loader, EPOCHS, policy=policy_of(name, 48), seed=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model, optimizer, loader = infobatch.prepare(model, optimizer, loader)
    for _ in range(EPOCHS):
        for points, labels in loader:
            logits = model(points)
            losses = functional.cross_entropy(logits, labels, reduction="none")
            accelerator.backward(infobatch.weigh(losses, outputs=logits))
            optimizer.step()
            optimizer.zero_grad()
    summary = infobatch.summary()
    assert summary["policy"] == name and summary["score"] == (registered()[name].score or "raw")
    assert (summary["saved_ratio"] > 0.02) == (name != "none")
    assert all(entry["kept"] % BATCH == 0 for entry in summary["per_pass"])


@pytest.mark.parametrize("name", NAMES)
def test_in_mmengine(scenes: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("mmseg")
    from test_engine.toy import config, train

    policy = policy_of(name, 22)
    own = {
        "ies": dict(min_visits=1),
        "scan": dict(warmup=0, cycle=1),
        "progressive_dropout": dict(revision=0, tau=0.01),
    }
    line = dict(type="InfoBatchHook", policy={**policy, **own.get(name, {})})
    overrides = {"train_cfg.max_iters": 12, "param_scheduler.0.end": 12}
    overrides |= dict.fromkeys(("val_dataloader", "val_evaluator", "val_cfg"))
    train(config(scenes, tmp_path, custom_hooks=[line], **overrides))
    summary = json.loads((tmp_path / "infobatch_summary.json").read_text())
    assert summary["policy"] == name and summary["passes_done"] == 3
    assert summary["score"] == (registered()[name].score or "raw")
    # Of 30 classes none is predicted with confidence so soon.
    kept = [entry["kept"] for entry in summary["per_pass"]]
    assert (min(kept[:2]) < 20) == (name not in ("none", "kakurenbo"))
    assert read_scores(tmp_path)["times_seen"].sum() == summary["visits"] == sum(kept)
