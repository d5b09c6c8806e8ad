"""Views of third parties: registered in a few lines, found by class, never by accident."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
from mmseg.models.decode_heads import FCNHead
from mmseg.models.losses import CrossEntropyLoss, DiceLoss
from oracle import make_inputs, make_labels, make_samples, make_weights, total
from oracle_losses import (
    labels_of,
    losses_alone,
    shown_by_own,
    tiny_model,
    weighted,
    weighted_mean,
    with_head,
)

import infobatch_mm.losses.hosts.mmseg  # noqa: F401 - registers for good what a test must not register for itself
from infobatch_mm.losses import (
    HeadRule,
    LossWeigher,
    SampleLosses,
    attach_views,
    register_head_rule,
    register_head_view,
    register_loss_view,
    register_separable_loss,
    registry,
)
from infobatch_mm.losses.registry import register_loss_factory, samplewise

SIZE = (8, 8)


@pytest.fixture(autouse=True)
def clean_registries(monkeypatch):
    for name in ("_LOSSES", "_HEADS"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))


# ---------------------------------------------------------------- a third party's losses and heads


class BrierLoss(nn.Module):
    """Squared error of the probabilities, a mean over all pixels."""

    loss_name = "loss_brier"

    def forward(self, pred, label, weight=None, ignore_index=255):
        return self.per_pixel(pred, label, ignore_index).mean()

    def per_pixel(self, pred, label, ignore_index):
        kept = label != ignore_index
        target = nn.functional.one_hot(torch.where(kept, label, 0), pred.shape[1]).movedim(-1, 1)
        return ((pred.softmax(1) - target) ** 2).sum(1) * kept


class SameBrierLoss(BrierLoss):
    """Nothing of its own."""


class OtherBrierLoss(BrierLoss):
    def forward(self, pred, label, weight=None, ignore_index=255):
        """Divided by the valid pixels: another loss than its parent's."""
        per_pixel = self.per_pixel(pred, label, ignore_index)
        return per_pixel.sum() / (label != ignore_index).sum()


def brier_view(loss, pred, label, weight=None, ignore_index=255):
    pixels = loss.per_pixel(pred, label, ignore_index)
    counts = (label != ignore_index).flatten(1).sum(1)
    return SampleLosses(pixels.flatten(1).sum(1), normaliser=label.numel(), counts=counts)


class OwnHead(FCNHead):
    """Calls its loss module by itself."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = labels_of(batch_data_samples)
        return dict(loss_own=self.loss_decode(seg_logits, labels, ignore_index=255))


class SameOwnHead(OwnHead):
    """Nothing of its own where losses are computed."""

    def forward(self, inputs):
        return 2 * super().forward(inputs)


class OtherOwnHead(OwnHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        return super().loss_by_feat(seg_logits, batch_data_samples)


class LayersFirstHead(FCNHead):
    """Its predictions have the layers of a decoder first, then the batch."""

    def forward(self, inputs):
        logits = super().forward(inputs)
        return torch.stack([logits, 2 * logits])

    def loss_by_feat(self, layers, batch_data_samples):
        labels = labels_of(batch_data_samples)
        return {f"loss_{k}": self.loss_decode(layer, labels, ignore_index=255) for k, layer in enumerate(layers)}


class PixelRowsHead(FCNHead):
    """Its predictions are rows of pixels, as many for each sample as it has valid ones."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = labels_of(batch_data_samples)
        kept = labels != 255
        return self.loss_of_rows(seg_logits.movedim(1, -1)[kept], [label[label != 255] for label in labels])

    def loss_of_rows(self, rows, row_labels):
        return dict(loss_rows=nn.functional.cross_entropy(rows, torch.cat(row_labels)))


def rows_of(head, arguments):
    return dict(rows=[len(labels) for labels in arguments["row_labels"]])


def with_loss(loss, head=OwnHead):
    model = with_head(head, dtype=torch.float64)
    model.decode_head.loss_decode = loss
    return model


def batch(blank=None):
    """Images whose maps are as large as their labels."""
    return make_inputs(size=(32, 32), dtype=torch.float64), make_labels(size=SIZE, blank=blank)


def step(model, weights=None, pruned=True):
    """Losses, gradient of the head's convolution, scores, and views of one step."""
    inputs, labels = batch()
    weigher, views = LossWeigher(), None
    if weights is not None:
        views = attach_views(model, weigher)
        weigher.begin(weights, pruned=pruned)
    losses = model.loss(inputs, make_samples(labels))
    total(losses).backward()
    return total(losses).detach(), model.decode_head.conv_seg.weight.grad, weigher.end(), views


def oracle(model, form, weights, predictions=None):
    """Gradient of the weighted objective, from the untouched head's loss on one sample at a time."""
    inputs, labels = batch()
    logits = model.decode_head(model.extract_feat(inputs))
    alone = predictions(model.decode_head, logits, labels) if predictions else alone_by_feat(model, logits, labels)
    form(alone, weights).backward()
    return model.decode_head.conv_seg.weight.grad, [float(each.detach()) for each in alone]


def alone_by_feat(model, logits, labels):
    head = model.decode_head
    return losses_alone(lambda pred, samples: total(head.loss_by_feat(pred, samples)), 4, logits, make_samples(labels))


def assert_weighed(make, form=weighted_mean, predictions=None, vectorised=False, separable=True, tolerance=1e-8):
    """Full passes are the host's; pruned ones have the oracle's gradient, the mean by weights, the samples' scores."""
    value, gradient, *_ = step(make())
    ours = step(make(), torch.ones(4), pruned=False)
    torch.testing.assert_close(ours[0], value, rtol=1e-9, atol=0)
    torch.testing.assert_close(ours[1], gradient, rtol=1e-9, atol=1e-12)
    weights = make_weights()
    expected, alone = oracle(make(), form, weights, predictions)
    shown, weighed, (scores, valid), views = step(make(), weights)
    assert float(shown) == pytest.approx(shown_by_own(value, [torch.tensor(each) for each in alone], weights), 1e-6)
    torch.testing.assert_close(weighed, expected, rtol=tolerance, atol=1e-12)
    assert views.vectorised == vectorised
    assert bool(views.not_separable) != separable
    assert valid.all()
    return scores, alone


def scored_by(scores, alone):
    assert scores.tolist() == pytest.approx(alone, rel=1e-6)


# ---------------------------------------------------------------- losses


def test_a_function_makes_a_vectorised_view():
    register_loss_view(BrierLoss)(brier_view)
    scores, alone = assert_weighed(lambda: with_loss(BrierLoss(), FCNHead), vectorised=True)
    shares = [(label != 255).double().mean() for label in batch()[1]]  # the score is a mean over valid pixels
    scored_by(scores, [float(each / share) for each, share in zip(alone, shares, strict=True)])


def test_the_decorator_gives_the_function_back():
    assert register_loss_view(BrierLoss)(brier_view) is brier_view


def test_a_separable_loss_needs_a_word_only():
    register_separable_loss(BrierLoss)
    scored_by(*assert_weighed(lambda: with_loss(BrierLoss(), FCNHead)))


def test_a_separable_loss_keeps_its_normaliser():
    """By the samples' valid pixels in the batch, not by each one's own."""
    register_separable_loss(OtherBrierLoss)
    valid = (batch()[1] != 255).flatten(1).sum(1)

    def held(alone, weights):
        return weighted([each * n / valid.sum() for each, n in zip(alone, valid, strict=True)], weights)

    scored_by(*assert_weighed(lambda: with_loss(OtherBrierLoss(), FCNHead), held))


def test_a_separable_losss_own_word_on_which_samples_can_be_scored():
    register_separable_loss(BrierLoss, valid=lambda loss, arguments: torch.tensor([True, False, True, True]))
    _, _, (scores, valid), _ = step(with_loss(BrierLoss(), FCNHead), torch.ones(4))
    assert valid.tolist() == [True, False, True, True]
    assert float(scores[1]) == 0


def test_losses_that_promise_nothing_are_taken_as_not_separable():
    scored_by(*assert_weighed(lambda: with_loss(OtherBrierLoss(), FCNHead), separable=False))


def test_a_factory_chooses_the_view_by_the_losss_settings():
    @register_loss_factory(BrierLoss)
    def choose(module, weigher, scored, title):
        return samplewise(separable=module.separable, trusted=True)(module, weigher, scored, title)

    for separable in (True, False):
        model = with_loss(BrierLoss(), FCNHead)
        model.decode_head.loss_decode.separable = separable
        assert bool(attach_views(model, LossWeigher()).not_separable) != separable


def test_a_registration_replaces_ours():
    @register_loss_view(DiceLoss)
    def refuse(loss, *args, **kwargs):
        raise RuntimeError("mine")

    model = with_loss(DiceLoss(), FCNHead)
    with pytest.raises(RuntimeError, match="mine"):
        step(model, torch.ones(4))


def test_what_is_known_of_a_loss_holds_for_subclasses_without_a_forward_of_their_own():
    register_loss_view(BrierLoss)(brier_view)
    attached = {
        loss: attach_views(with_loss(loss(), FCNHead), LossWeigher())
        for loss in (BrierLoss, SameBrierLoss, OtherBrierLoss)
    }
    assert [views.vectorised for views in attached.values()] == [True, True, False]
    assert attached[OtherBrierLoss].not_separable == ["decode_head.loss_decode (OtherBrierLoss of FCNHead)"]


def test_a_subclass_has_a_registration_of_its_own_where_it_has_one():
    register_loss_view(BrierLoss)(brier_view)
    register_separable_loss(SameBrierLoss)
    views = attach_views(with_loss(SameBrierLoss(), FCNHead), LossWeigher())
    assert not views.vectorised and not views.not_separable
    assert attach_views(with_loss(BrierLoss(), FCNHead), LossWeigher()).vectorised


class ScaledCrossEntropy(CrossEntropyLoss):
    def forward(self, *args, **kwargs):
        return 3 * super().forward(*args, **kwargs)


def test_a_cross_entropy_with_a_forward_of_its_own_is_weighed_as_what_it_is():
    scored_by(*assert_weighed(lambda: with_loss(ScaledCrossEntropy(), FCNHead), separable=False))


def test_a_view_of_a_function_that_gives_other_samples_is_refused_by_name():
    @register_loss_view(BrierLoss)
    def halved(loss, pred, label, **kwargs):
        losses = brier_view(loss, pred, label)  # its loss is the host's, but not its number of samples
        return SampleLosses(losses.sums.view(2, 2).sum(1), losses.normaliser, losses.counts[:2])

    with pytest.raises(ValueError, match=r"(?s)decode_head\.loss_decode \(BrierLoss of FCNHead\).*2 samples.*4"):
        step(with_loss(BrierLoss(), FCNHead), torch.ones(4))


# ---------------------------------------------------------------- heads


def test_a_head_by_its_modules():
    register_head_rule(OwnHead, HeadRule(by_modules=True))
    assert_weighed(lambda: with_loss(CrossEntropyLoss()), vectorised=True)


def test_a_head_nobody_registered_is_evaluated_sample_by_sample():
    scored_by(*assert_weighed(lambda: with_loss(CrossEntropyLoss()), separable=False))


def test_a_separable_head():
    register_head_rule(OwnHead, HeadRule(separable=True))
    scored_by(*assert_weighed(lambda: with_loss(CrossEntropyLoss())))


def two_terms(head, seg_logits, batch_data_samples):
    labels = labels_of(batch_data_samples)
    pixels = nn.functional.cross_entropy(seg_logits, labels, ignore_index=255, reduction="none")
    counts = (labels != 255).flatten(1).sum(1)
    penalty = seg_logits.pow(2).flatten(1)
    return dict(
        loss_own=SampleLosses(pixels.flatten(1).sum(1), labels.numel(), counts),
        loss_penalty=SampleLosses(penalty.sum(1), penalty.numel(), torch.full_like(counts, penalty.shape[1])),
        largest=seg_logits.detach().max(),
    )


class TwoTermsHead(FCNHead):
    """Two losses of its own, both means over samples of equal size, and something to show."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = labels_of(batch_data_samples)
        loss = nn.functional.cross_entropy(seg_logits, labels, ignore_index=255, reduction="none").mean()
        return dict(loss_own=loss, loss_penalty=seg_logits.pow(2).mean(), largest=seg_logits.detach().max())


def test_a_function_makes_a_vectorised_view_of_a_head():
    assert register_head_view(TwoTermsHead)(two_terms) is two_terms
    scores, _ = assert_weighed(lambda: with_head(TwoTermsHead, torch.float64), vectorised=True)
    model = with_head(TwoTermsHead, torch.float64)
    inputs, labels = batch()
    apart = two_terms(model.decode_head, model.decode_head(model.extract_feat(inputs)), make_samples(labels))
    expected = sum(each.sums / each.counts for each in (apart["loss_own"], apart["loss_penalty"]))
    scored_by(scores, expected.tolist())


def test_a_function_of_a_head_shows_what_the_host_shows():
    register_head_view(TwoTermsHead)(two_terms)
    model, weigher = with_head(TwoTermsHead), LossWeigher()
    attach_views(model, weigher)
    inputs, labels = make_inputs(size=(32, 32)), make_labels(size=SIZE)
    weigher.begin(make_weights(), pruned=False)
    ours = model.loss(inputs, make_samples(labels))
    theirs = with_head(TwoTermsHead).loss(inputs, make_samples(labels))
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=0)


def changed(result, **changes):
    return {key: value for key, value in {**result, **changes}.items() if value is not None}


@pytest.mark.parametrize("pruned", [False, True], ids=["full", "pruned"])
@pytest.mark.parametrize(
    ("function", "pattern"),
    [
        (
            lambda result: changed(result, loss_penalty=SampleLosses(2 * result["loss_penalty"].sums, 1280.0, 1)),
            r"gives [\de.-]+ for loss_penalty, the host [\de.-]+",
        ),
        (lambda result: changed(result, loss_penalty=None), "no SampleLosses for loss_penalty"),
        (lambda result: changed(result, loss_penalty=result["loss_penalty"].shown()), "no SampleLosses for loss_pen"),
        (
            lambda result: changed(result, loss_more=result["loss_penalty"]),
            "loss_more",
        ),
    ],
    ids=["another_value", "left_out", "not_taken_apart", "one_more"],
)
def test_a_function_that_computes_something_else_than_the_head_is_refused(function, pattern, pruned):
    register_head_view(TwoTermsHead)(lambda *args: function(two_terms(*args)))
    with pytest.raises(ValueError, match=rf"(?s)decode_head \(TwoTermsHead\).*({pattern})"):
        step(with_head(TwoTermsHead, torch.float64), torch.ones(4), pruned)


def test_a_function_that_computes_another_loss_than_the_module_is_refused_with_both_numbers():
    register_loss_view(OtherBrierLoss)(brier_view)
    with pytest.raises(
        ValueError,
        match=r"(?s)decode_head\.loss_decode \(OtherBrierLoss.*gives 0\.\d+ for its loss, the host [01]\.\d+",
    ):
        step(with_loss(OtherBrierLoss(), FCNHead), torch.ones(4))


class ListHead(FCNHead):
    """One loss for each of its layers, in a list, as the host allows."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = labels_of(batch_data_samples)
        losses = [
            nn.functional.cross_entropy(k * seg_logits, labels, reduction="none", ignore_index=255) for k in (1, 2)
        ]
        return dict(loss_layers=[loss.mean() for loss in losses])


def two_layers(head, seg_logits, batch_data_samples):
    return dict(loss_layers=[two_terms(head, k * seg_logits, batch_data_samples)["loss_own"] for k in (1, 2)])


def test_a_function_of_a_head_that_gives_lists_is_refused_by_name():
    register_head_view(ListHead)(two_layers)
    with pytest.raises(ValueError, match=r"(?s)decode_head \(ListHead\).*loss_layers"):
        step(with_head(ListHead, torch.float64), torch.ones(4))


def test_a_function_of_a_head_holds_for_subclasses_that_compute_no_loss_of_their_own():
    register_head_view(OwnHead)(two_terms)
    attached = [
        attach_views(with_loss(CrossEntropyLoss(), head), LossWeigher()) for head in (SameOwnHead, OtherOwnHead)
    ]
    assert [views.vectorised for views in attached] == [True, False]


class OtherRowsHead(PixelRowsHead):
    def loss_of_rows(self, rows, row_labels):
        return dict(loss_rows=rows.pow(2).mean())


def test_a_rule_of_another_method_does_not_hold_for_subclasses_that_define_it():
    register_head_rule(PixelRowsHead, HeadRule(method="loss_of_rows", rows=rows_of, separable=True, trusted=True))
    assert not attach_views(with_head(PixelRowsHead), LossWeigher()).not_separable
    assert attach_views(with_head(OtherRowsHead), LossWeigher()).not_separable


def test_what_is_known_of_a_head_holds_for_subclasses_that_compute_no_loss_of_their_own():
    register_head_rule(OwnHead, HeadRule(by_modules=True))
    attached = [
        attach_views(with_loss(CrossEntropyLoss(), head), LossWeigher()) for head in (SameOwnHead, OtherOwnHead)
    ]
    assert [views.vectorised for views in attached] == [True, False]
    assert attached[1].not_separable == ["decode_head (OtherOwnHead)"]


@pytest.mark.parametrize("separable", [True, False])
def test_a_head_with_the_batch_along_another_axis(separable):
    register_head_rule(LayersFirstHead, HeadRule(axes=dict(layers=1), separable=separable))

    def alone(head, layers, labels):
        samples = make_samples(labels)
        return [total(head.loss_by_feat(layers[:, i : i + 1], samples[i : i + 1])) for i in range(4)]

    scored_by(
        *assert_weighed(lambda: with_head(LayersFirstHead, torch.float64), predictions=alone, separable=separable)
    )


def test_a_head_with_the_batch_along_another_axis_is_refused_without_a_word():
    with pytest.raises(
        ValueError, match=r"(?s)decode_head \(LayersFirstHead\).*layers.*\(2, 4, 5, 8, 8\).*docs/losses\.md"
    ):
        step(with_head(LayersFirstHead, torch.float64), torch.ones(4))


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("separable", [True, False])
def test_a_head_whose_rows_belong_to_its_samples(separable, trusted):
    rule = HeadRule(method="loss_of_rows", rows=rows_of, separable=separable, trusted=trusted)
    register_head_rule(PixelRowsHead, rule)
    valid = (batch()[1] != 255).flatten(1).sum(1)

    def alone(head, logits, labels):
        return [total(head.loss_by_feat(logits[i : i + 1], make_samples(labels[i : i + 1]))) for i in range(4)]

    def held(losses, weights):
        return weighted([each * n / valid.sum() for each, n in zip(losses, valid, strict=True)], weights)

    scored_by(
        *assert_weighed(
            lambda: with_head(PixelRowsHead, torch.float64),
            held if separable else weighted_mean,
            predictions=alone,
            separable=separable,
        )
    )


def test_a_heads_own_word_on_which_samples_can_be_scored():
    register_head_rule(OwnHead, HeadRule(valid=lambda head, arguments: torch.tensor([True, False, True, True])))
    _, _, (scores, valid), _ = step(with_loss(CrossEntropyLoss()), torch.ones(4))
    assert valid.tolist() == [True, False, True, True]
    assert float(scores[1]) == 0


def test_a_sample_without_a_valid_pixel_has_no_score():
    model, weigher = with_loss(CrossEntropyLoss()), LossWeigher()
    attach_views(model, weigher)
    inputs, labels = batch(blank=1)
    weigher.begin(torch.ones(4))
    model.loss(inputs, make_samples(labels))
    assert weigher.end()[1].tolist() == [True, False, True, True]


def test_a_head_without_the_method_is_refused():
    register_head_rule(OwnHead, HeadRule(method="loss_of_nothing"))
    with pytest.raises(ValueError, match=r"decode_head \(OwnHead\) has no loss_of_nothing\(\).*docs/losses\.md"):
        attach_views(with_loss(CrossEntropyLoss()), LossWeigher())


def test_an_unknown_word_in_a_rule_is_an_error():
    with pytest.raises(TypeError, match="sepparable"):
        HeadRule(sepparable=True)


def test_the_tiny_model_is_the_hosts_own():
    assert type(tiny_model()).__module__.startswith("mmseg.")
