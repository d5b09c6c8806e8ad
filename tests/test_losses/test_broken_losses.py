"""A loss that is trained on and NaN or infinite makes the score of its sample NaN, whether it counts in it or not."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
from mmseg.models.decode_heads import FCNHead
from oracle import fcn, make_inputs, make_labels, make_samples, make_weights
from oracle_losses import labels_of, passes, tiny_model

from infobatch_mm.core.store import ScoreStore
from infobatch_mm.losses import LossWeigher, attach_views

BROKEN = 2


class InlineHead(FCNHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = labels_of(batch_data_samples)
        pixels = nn.functional.cross_entropy(seg_logits, labels, ignore_index=255, reduction="none")
        return dict(loss_own=pixels.mean())


AUXILIARY = {
    "vectorised": dict(type="CrossEntropyLoss"),
    "avg_non_ignore": dict(type="CrossEntropyLoss", avg_non_ignore=True),
    "dice": dict(type="DiceLoss"),
    "tversky": dict(type="TverskyLoss"),
    "inline": dict(type="CrossEntropyLoss"),
}
#: Those whose values by sample are not known in a full pass, where nothing but the gradient of the batch is needed.
UNKNOWN_IN_FULL_PASSES = ("tversky", "inline")


def make(name):
    model = tiny_model(auxiliary_head=fcn(0, 4, num_convs=0, loss=AUXILIARY[name]))
    if name == "inline":
        model.auxiliary_head.__class__ = InlineHead
    return model


def spoil(head, value):
    """The logits of one sample are not finite from here on."""
    forward = head.forward

    def spoiled(inputs):
        logits = forward(inputs)
        return torch.cat([logits[:BROKEN], logits[BROKEN : BROKEN + 1] + value, logits[BROKEN + 1 :]])

    head.forward = spoiled


def step(model, pruned, blank=None):
    weigher = LossWeigher()
    attach_views(model, weigher)
    for spoiled in (False, True):  # what is proven is proven in the first step
        if spoiled:
            spoil(model.auxiliary_head, math.nan)
        weigher.begin(make_weights() if pruned else torch.ones(4), pruned)
        model.loss(make_inputs(size=(32, 32)), make_samples(make_labels(size=(8, 8), blank=blank)))
        result = weigher.end()
        if not spoiled:
            assert result[0].isfinite().all()
    return result


@passes
@pytest.mark.parametrize("name", AUXILIARY)
def test_the_sample_of_a_broken_auxiliary_loss_has_no_score(name, pruned):
    scores, valid = step(make(name), pruned)
    assert valid.all()
    expected = [i != BROKEN for i in range(4)]
    if name in UNKNOWN_IN_FULL_PASSES and not pruned:
        expected = [False] * 4
    assert scores.isfinite().tolist() == expected
    store = ScoreStore(4)
    store.record(torch.arange(4), scores, valid)
    store.flush()
    assert store.num_nonfinite == expected.count(False)
    assert store.seen.tolist() == expected


@passes
def test_a_blank_sample_stays_a_blank_one(pruned):
    scores, valid = step(make("vectorised"), pruned, blank=BROKEN)
    assert valid.tolist() == [i != BROKEN for i in range(4)]
    assert scores[valid].isfinite().all()


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_every_loss_that_is_weighed_is_looked_at(odd):
    weigher = LossWeigher()
    weigher.begin(torch.ones(3))
    weigher.score(torch.ones(3))
    weigher.weigh(torch.tensor([1.0, odd, 1.0], requires_grad=True), torch.tensor(odd), 3.0)
    scores, valid = weigher.end()
    assert scores.isfinite().tolist() == [True, False, True] and valid.all()


def test_rows_of_losses_are_looked_at():
    weigher = LossWeigher()
    weigher.begin(torch.ones(3))
    weigher.score(torch.ones(3))
    weigher.weigh_rows(torch.tensor([[1.0, 1.0], [1.0, math.nan], [1.0, 1.0]], requires_grad=True))
    assert weigher.end()[0].isfinite().tolist() == [True, False, True]


def test_a_part_that_is_broken_breaks_its_sample():
    weigher = LossWeigher()
    weigher.begin(torch.ones(3))
    weigher.score(torch.ones(3))
    with weigher.in_parts(torch.tensor([2, 1, 2]), 5):
        weigher.weigh(torch.tensor([1.0, math.inf, 1.0, 1.0, 1.0]), torch.tensor(1.0), 5.0)
    with weigher.narrowed([2]):
        weigher.weigh(torch.tensor([math.nan]), torch.tensor(1.0), 1.0)
    assert weigher.end()[0].isfinite().tolist() == [False, True, False]


def test_both_samples_of_a_mixed_image_are_broken():
    weigher = LossWeigher()
    weigher.begin(torch.ones(3))
    weigher.mix(torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    weigher.score(torch.ones(3))
    weigher.weigh(torch.tensor([math.nan, 1.0, 1.0]), torch.tensor(1.0), 3.0)
    assert weigher.end()[0].isfinite().tolist() == [False, False, True]


def test_the_next_batch_is_trusted_again():
    weigher = LossWeigher()
    for odd in (math.nan, 1.0):
        weigher.begin(torch.ones(2))
        weigher.score(torch.ones(2))
        weigher.weigh(torch.tensor([odd, 1.0]), torch.tensor(1.0), 1.0)
        scores, _ = weigher.end()
        assert bool(scores[0].isfinite()) == (odd == 1.0)
