"""A batch without a valid pixel: the host's values and gradients, and scores that are all invalid."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
from mmseg.models.decode_heads import FCNHead
from oracle import assert_same_tensors, ce, fcn, gradients, make_inputs, make_labels, make_samples, total
from oracle_losses import labels_of, passes, tiny_model, with_head, with_loss

from infobatch_mm.losses import LossWeigher, SampleLosses, attach_views, register_head_view, registry

SIZE = (8, 8)


class InlineHead(FCNHead):
    """A mean over the batch's valid pixels: NaN where there is none."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        return dict(loss_own=nn.functional.cross_entropy(seg_logits, labels_of(batch_data_samples), ignore_index=255))


class SilentHead(FCNHead):
    """Has no loss at all for a batch without a valid pixel."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = labels_of(batch_data_samples)
        if bool((labels == 255).all()):
            return dict(shown=seg_logits.detach().mean())
        return dict(loss_own=nn.functional.cross_entropy(seg_logits, labels, ignore_index=255))


class EmptyHead(FCNHead):
    """Chooses its pixels: of none, the loss is empty."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = labels_of(batch_data_samples)
        chosen = seg_logits.movedim(1, -1)[labels != 255]
        if len(chosen) == 0:
            return dict(loss_own=chosen.sum(1) * 0)
        return dict(loss_own=nn.functional.cross_entropy(chosen, labels[labels != 255]))


def silent_view(head, seg_logits, batch_data_samples):
    labels = labels_of(batch_data_samples)
    counts = (labels != 255).flatten(1).sum(1)
    if not bool(counts.any()):
        return dict(shown=seg_logits.detach().mean())
    pixels = nn.functional.cross_entropy(seg_logits, labels, ignore_index=255, reduction="none")
    return dict(loss_own=SampleLosses(pixels.flatten(1).sum(1), counts.sum(), counts, mean_over_valid=True))


LOVASZ = dict(type="LovaszLoss", reduction="none")
MODELS_UNDER_TEST = {
    "lovasz": with_loss(**LOVASZ),
    "lovasz_all_classes": with_loss(**LOVASZ, classes="all", loss_weight=0.4),
    "lovasz_beside_cross_entropy": lambda: tiny_model(fcn(0, 4, num_convs=0, channels=4, loss=[LOVASZ, ce()])),
    "lovasz_beside_auxiliary": lambda: tiny_model(
        fcn(0, 4, num_convs=0, channels=4, loss=LOVASZ), auxiliary_head=fcn(0, 4, num_convs=0)
    ),
    "cross_entropy": tiny_model,
    "avg_non_ignore": with_loss(**ce(avg_non_ignore=True)),
    "dice": with_loss(type="DiceLoss"),
    "tversky": with_loss(type="TverskyLoss"),
    "inline": lambda: with_head(InlineHead),
    "empty": lambda: with_head(EmptyHead),
    "silent": lambda: with_head(SilentHead),
}
every_model = pytest.mark.parametrize("make", MODELS_UNDER_TEST.values(), ids=MODELS_UNDER_TEST.keys())


def batch(blank, seed=0):
    labels = make_labels(size=SIZE, seed=seed)
    if blank:
        labels[:] = 255
    return make_inputs(size=(32, 32), seed=seed + 1), make_samples(labels)


def step(model, blank, seed=0):
    model.zero_grad()
    losses = model.loss(*batch(blank, seed))
    value = total(losses)
    if isinstance(value, torch.Tensor) and value.requires_grad:
        value.backward()
    return losses, gradients(model)


def assert_same(ours, theirs):
    assert_same_tensors(*(dict(each[0]) for each in (ours, theirs)))
    assert list(ours[1]) == list(theirs[1])
    for key, gradient in theirs[1].items():
        if gradient is None:
            assert ours[1][key] is None or not ours[1][key].any(), key
        else:
            torch.testing.assert_close(ours[1][key], gradient, rtol=0, atol=0, equal_nan=True)


@passes
@every_model
@pytest.mark.parametrize("when", ["first", "later"])
def test_a_batch_without_a_valid_pixel_is_the_hosts_and_goes_on(make, pruned, when):
    model, host = make(), make()
    weigher = LossWeigher()
    attach_views(model, weigher)
    ones = torch.ones(4)
    if when == "later":
        weigher.begin(ones, pruned)
        step(model, False, 7)
        assert weigher.end()[1].all()
    weigher.begin(ones, pruned)
    ours, theirs = step(model, True), step(host, True)
    reached = weigher.reached
    scores, valid = weigher.end()
    assert reached and scores is not None, "the hook would end the run"
    assert scores.shape == valid.shape == (4,) and not valid.any() and not scores.any()
    assert scores.dtype == torch.float32 and valid.dtype == torch.bool
    assert_same(ours, theirs)
    weigher.begin(ones, pruned=False)  # and the run goes on
    ours, theirs = step(model, False, 3), step(host, False, 3)
    assert weigher.end()[1].all()
    torch.testing.assert_close(total(ours[0]), total(theirs[0]), rtol=1e-6, atol=0)


def test_a_vectorised_view_may_have_nothing_to_score(monkeypatch):
    monkeypatch.setattr(registry, "_HEADS", dict(registry._HEADS))
    register_head_view(SilentHead)(silent_view)
    model, weigher = with_head(SilentHead), LossWeigher()
    attach_views(model, weigher)
    weigher.begin(torch.ones(4))
    step(model, True)
    scores, valid = weigher.end()
    assert scores.tolist() == [0.0] * 4 and not valid.any()


def test_a_batch_that_met_no_view_has_no_scores_at_all():
    """Else a model whose views are not called would be pruned by nothing, without a word."""
    weigher = LossWeigher()
    weigher.begin(torch.ones(4))
    assert weigher.end() == (None, None)
    model = with_head(InlineHead)
    attach_views(model, weigher)
    weigher.begin(torch.ones(4))
    model.extract_feat(batch(False)[0])
    assert weigher.end() == (None, None)
