"""Heads and losses that are evaluated sample by sample, in runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmseg")

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.models.decode_heads import FCNHead
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS

from infobatch_mm.engine import InfoBatchHook

from .toy import config, train

LOVASZ = dict(type="LovaszLoss", reduction="none", loss_weight=1.0)


@MODELS.register_module(force=True)
class NoisyHead(FCNHead):
    """Draws random numbers in its loss, as heads that sample points do."""

    def loss_by_feat(self, seg_logits: torch.Tensor, batch_data_samples: list) -> dict:
        losses = super().loss_by_feat(seg_logits, batch_data_samples)
        losses["loss_noisy"] = (seg_logits * torch.rand_like(seg_logits)).square().mean()
        return losses


@MODELS.register_module(force=True)
class FirstHalfHead(FCNHead):
    """Trains on the first half of the batch."""

    def loss_by_feat(self, seg_logits: torch.Tensor, batch_data_samples: list) -> dict:
        half = max(1, len(seg_logits) // 2)
        return super().loss_by_feat(seg_logits[:half], batch_data_samples[:half])


@MODELS.register_module(force=True)
class PenalisedSegmentor(EncoderDecoder):
    """Adds a loss where the runner asks for losses, behind ``loss``."""

    def forward(self, inputs: torch.Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
        losses = super().forward(inputs, data_samples, mode)
        if mode == "loss":
            losses["loss_penalty"] = sum(each.square().sum() for each in self.decode_head.parameters())
        return losses


class Forms(Hook):
    """Which form the losses of each iteration had, and whether its pass was pruned."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool]] = []

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        hook = next(hook for hook in runner.hooks if isinstance(hook, InfoBatchHook))
        assert hook._pruner is not None and hook._pruner.plan is not None
        self.seen.append((hook._weigher.pruned, hook._pruner.plan.pruned))


@pytest.mark.parametrize("head", ["FCNHead", "NoisyHead"])
def test_policy_none_changes_nothing_where_losses_are_evaluated_sample_by_sample(
    scenes: Path, tmp_path: Path, head: str
) -> None:
    overrides: dict[str, Any] = {
        "model.decode_head.type": head,
        "model.decode_head.loss_decode": [dict(type="CrossEntropyLoss"), LOVASZ],
        "train_cfg.max_iters": 12,
    }
    host_runner, host = train(config(scenes, tmp_path / "host", custom_hooks=[], **overrides))
    hooks = [dict(type="InfoBatchHook", policy="none")]
    our_runner, ours = train(config(scenes, tmp_path / "ours", custom_hooks=hooks, **overrides))
    assert ours.losses == host.losses
    ours_state, host_state = our_runner.model.state_dict(), host_runner.model.state_dict()
    assert all(torch.equal(ours_state[key], host_state[key]) for key in host_state)


def test_the_form_is_that_of_the_pass(scenes: Path, tmp_path: Path) -> None:
    forms = Forms()
    runner, _ = train(config(scenes, tmp_path, **{"model.decode_head.loss_decode": LOVASZ}), forms)
    assert {pruned for pruned, _ in forms.seen} == {True, False}
    assert all(form == pruned for form, pruned in forms.seen)
    assert runner.iter < 33


def test_the_log_names_losses_that_do_not_separate_once(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    losses = [dict(type="CrossEntropyLoss"), LOVASZ]
    train(config(scenes, tmp_path, log_level="INFO", **{"model.decode_head.loss_decode": losses}))
    text = "".join(path.read_text() for path in tmp_path.rglob("*.log"))
    assert text.count("do not separate over samples") == 1
    assert "decode_head.loss_decode.1 (LovaszLoss of FCNHead)" in text


def test_a_head_that_drops_samples_is_refused_in_the_first_step(scenes: Path, tmp_path: Path) -> None:
    runner = Runner.from_cfg(config(scenes, tmp_path, **{"model.decode_head.type": "FirstHalfHead"}))
    with pytest.raises(ValueError, match=r"(?s)decode_head \(FirstHalfHead\) cannot be weighed.*docs/losses\.md"):
        runner.train()
    assert runner.iter == 0


def test_a_loss_that_no_head_computes_is_refused_in_the_first_step(scenes: Path, tmp_path: Path) -> None:
    runner = Runner.from_cfg(config(scenes, tmp_path, **{"model.type": "PenalisedSegmentor"}))
    with pytest.raises(ValueError, match=r"(?s)loss_penalty trains decode_head\..*docs/losses\.md"):
        runner.train()
    assert runner.iter == 0
