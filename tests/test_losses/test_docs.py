"""The examples of docs/losses.md, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("mmseg")

from mmseg.models.decode_heads import FCNHead
from oracle import make_inputs, make_labels, make_samples, total
from oracle_losses import tiny_model

import infobatch_mm.losses.hosts.mmseg  # noqa: F401 - registers for good what a test must not register for itself
from infobatch_mm.losses import LossWeigher, attach_views, registry

SNIPPETS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/losses.md").read_text(), flags=re.DOTALL
)


class MyLoss(nn.Module):
    loss_name = "loss_mine"

    def forward(self, pred, target, weight=None, reduction_override=None, ignore_index=255):
        pixels = F.cross_entropy(pred, target, ignore_index=ignore_index, reduction="none")
        if weight is not None:
            pixels = pixels * weight
        return pixels if reduction_override == "none" else pixels.mean()


class MyHead(FCNHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        target = self._stack_batch_gt(batch_data_samples).squeeze(1)
        seg_logits = F.interpolate(seg_logits, target.shape[1:], mode="bilinear")
        return dict(loss_ce=F.cross_entropy(seg_logits, target, ignore_index=255, reduction="none").mean())


class MyQueryHead(FCNHead):
    pass


class MyRoIHead(FCNHead):
    pass


@pytest.fixture(autouse=True)
def clean_registries(monkeypatch):
    for name in ("_LOSSES", "_HEADS"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))


def run(snippet: str) -> None:
    names = dict(F=F, MyLoss=MyLoss, MyHead=MyHead, MyQueryHead=MyQueryHead, MyRoIHead=MyRoIHead)
    exec(snippet, names)


def step(model: nn.Module, weigher: LossWeigher | None = None) -> tuple[float, torch.Tensor]:
    labels = make_labels(size=(8, 8), blank=1)
    if weigher is not None:
        weigher.begin(torch.ones(4), pruned=True)
    loss = total(model.loss(make_inputs(size=(8, 8)), make_samples(labels)))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_examples_of_the_docs_run(snippet: str) -> None:
    run(snippet)


@pytest.mark.parametrize(("marker", "vectorised"), [("@register_loss_view", True), ("register_separable_loss(", False)])
def test_the_losses_of_the_docs_are_the_hosts(marker: str, vectorised: bool) -> None:
    run(next(snippet for snippet in SNIPPETS if marker in snippet))
    host, model = tiny_model(), tiny_model()
    host.decode_head.loss_decode, model.decode_head.loss_decode = MyLoss(), MyLoss()
    check(host, model, vectorised)


def test_the_head_of_the_docs_is_the_hosts() -> None:
    run(next(snippet for snippet in SNIPPETS if "@register_head_view" in snippet))
    host, model = tiny_model(), tiny_model()
    host.decode_head.__class__ = model.decode_head.__class__ = MyHead
    check(host, model, vectorised=True)


def check(host: nn.Module, model: nn.Module, vectorised: bool) -> None:
    model.load_state_dict(host.state_dict())
    weigher = LossWeigher()
    views = attach_views(model, weigher)
    assert views.vectorised == vectorised and not views.not_separable
    value, gradient = step(model, weigher)
    expected, host_gradient = step(host)
    assert value == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, host_gradient, rtol=1e-5, atol=1e-8)
    assert len(weigher.end()[0]) == 4
