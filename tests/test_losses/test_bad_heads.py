"""Heads and losses that cannot be weighed are refused in the first step at the latest, by name and with advice."""

import contextlib

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
from mmseg.models.decode_heads import FCNHead
from mmseg.models.segmentors import EncoderDecoder
from oracle import assert_same_tensors, gradients, make_inputs, make_labels, make_samples, make_weights, total
from oracle_losses import labels_of, passes, with_head

from infobatch_mm.losses import LossWeigher, attach_views, register_head_rule, registry

SIZE = (8, 8)
ADVICE = r"docs/losses\.md"


def cross_entropies(logits, samples):
    """One loss for each sample."""
    return nn.functional.cross_entropy(logits, labels_of(samples), ignore_index=255, reduction="none").mean((1, 2))


def cross_entropy(logits, samples):
    return cross_entropies(logits, samples).mean()


class OwnHead(FCNHead):
    """A head with a loss of its own, that is fine."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        return dict(loss_own=cross_entropy(seg_logits, batch_data_samples))


# ---------------------------------------------------------------- heads that lose samples


class FirstHalf(FCNHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        half = (len(seg_logits) + 1) // 2
        return dict(loss_own=cross_entropy(seg_logits[:half], batch_data_samples[:half]))


class HardestHalf(FCNHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        losses = cross_entropies(seg_logits, batch_data_samples)
        return dict(loss_own=losses.topk((len(losses) + 1) // 2).values.mean())


class FirstSampleOnly(FCNHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        return dict(loss_own=cross_entropy(seg_logits[:1], batch_data_samples[:1]))


class WorstPixelOfTheBatch(FCNHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = labels_of(batch_data_samples)
        return dict(loss_own=nn.functional.cross_entropy(seg_logits, labels, ignore_index=255, reduction="none").max())


class HalfBeforeTheLoss(FCNHead):
    def loss(self, inputs, batch_data_samples, train_cfg):
        return self.loss_by_feat(self.forward(inputs)[:2], batch_data_samples[:2])


class OwnHalfBeforeTheLoss(OwnHead):
    loss = HalfBeforeTheLoss.loss


# ---------------------------------------------------------------- heads that reorder them


class PermutedLogits(FCNHead):
    def forward(self, inputs):
        return super().forward(inputs).flip(0)

    def loss_by_feat(self, seg_logits, batch_data_samples):
        return dict(loss_own=cross_entropy(seg_logits, batch_data_samples[::-1]))


class PermutedBeforeTheLoss(FCNHead):
    """Logits and samples in another order, in which the loss modules see them."""

    def loss(self, inputs, batch_data_samples, train_cfg):
        return self.loss_by_feat(self.forward(inputs).flip(0), batch_data_samples[::-1])


class OwnPermutedBeforeTheLoss(OwnHead):
    loss = PermutedBeforeTheLoss.loss


# ---------------------------------------------------------------- heads without a batch


class PixelsInOneRow(FCNHead):
    def forward(self, inputs):
        return super().forward(inputs).movedim(1, 0).flatten(1)[None]  # (1, classes, all pixels)

    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = labels_of(batch_data_samples).flatten()[None]
        return dict(loss_own=nn.functional.cross_entropy(seg_logits, labels, ignore_index=255))


class TwiceTheRows(FCNHead):
    """Two predictions for each sample, in one tensor, for the loss modules."""

    def forward(self, inputs):
        logits = super().forward(inputs)
        return torch.cat([logits, 2 * logits])

    def _stack_batch_gt(self, batch_data_samples):
        labels = super()._stack_batch_gt(batch_data_samples)
        return torch.cat([labels, labels])


class OwnTwiceTheRows(FCNHead):
    def forward(self, inputs):
        logits = super().forward(inputs)
        return torch.cat([logits, 2 * logits])

    def loss_by_feat(self, seg_logits, batch_data_samples):
        return dict(loss_own=cross_entropy(seg_logits, 2 * batch_data_samples))


class NotOfPredictions(FCNHead):
    """Takes its logits from elsewhere than its arguments."""

    def loss(self, inputs, batch_data_samples, train_cfg):
        self.logits = self.forward(inputs)
        return self.loss_by_feat(batch_data_samples)

    def loss_by_feat(self, batch_data_samples):
        return dict(loss_own=cross_entropy(self.logits, batch_data_samples))


# ---------------------------------------------------------------- losses that are no scalars


class PixelMap(FCNHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = labels_of(batch_data_samples)
        return dict(loss_own=nn.functional.cross_entropy(seg_logits, labels, ignore_index=255, reduction="none"))


class OneForEachSample(FCNHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        return dict(loss_own=cross_entropies(seg_logits, batch_data_samples))


class PixelMapLoss(nn.Module):
    loss_name = "loss_map"

    def forward(self, pred, label, weight=None, ignore_index=255):
        return nn.functional.cross_entropy(pred, label, ignore_index=ignore_index, reduction="none")


# ---------------------------------------------------------------- losses of one sample


class NeedsPairs(FCNHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        if len(seg_logits) < 2:
            raise IndexError("a pair needs two samples")
        return dict(loss_own=cross_entropy(seg_logits, batch_data_samples))


class NextPairs(FCNHead):
    """Pairs each sample with the next one."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        losses = dict(loss_own=cross_entropy(seg_logits, batch_data_samples))
        if len(seg_logits) > 1:
            losses["loss_pairs"] = (seg_logits - seg_logits.roll(1, 0)).pow(2).mean()
        return losses


class AllPairs(FCNHead):
    """Has one more loss where there are pairs."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        losses = dict(loss_own=cross_entropy(seg_logits, batch_data_samples))
        if len(seg_logits) > 1:
            losses["loss_pairs"] = seg_logits.var(0).mean()
        return losses


# ---------------------------------------------------------------- losses beside the views


class RegularisedSegmentor(EncoderDecoder):
    def loss(self, inputs, data_samples):
        losses = super().loss(inputs, data_samples)
        losses["loss_weights"] = sum(each.pow(2).sum() for each in self.backbone.parameters())
        return losses


class DistillingSegmentor(EncoderDecoder):
    """Adds a term to a weighed loss: its key is one that a view knows."""

    def loss(self, inputs, data_samples):
        losses = super().loss(inputs, data_samples)
        losses["decode.loss_ce"] = losses["decode.loss_ce"] + self.extract_feat(inputs)[0].pow(2).mean()
        return losses


def model_of(head=FCNHead, loss=None, segmentor=None):
    model = with_head(head)
    if loss is not None:
        model.decode_head.loss_decode = loss()
    if segmentor is not None:
        model.__class__ = segmentor
    return model


def of_head(name):
    return rf"decode_head \({name}\)"


def of_loss(name, head="FCNHead"):
    return rf"decode_head\.loss_decode \({name} of {head}\)"


REFUSED = {
    "first_half": (dict(head=FirstHalf), of_head("FirstHalf"), "another order"),
    "hardest_half": (dict(head=HardestHalf), of_head("HardestHalf"), "no part in the loss of the batch"),
    "first_sample_only": (dict(head=FirstSampleOnly), of_head("FirstSampleOnly"), "another order"),
    "worst_pixel": (dict(head=WorstPixelOfTheBatch), of_head("WorstPixelOfTheBatch"), "no part in the loss"),
    "half_before_the_loss": (dict(head=HalfBeforeTheLoss), of_head("HalfBeforeTheLoss"), "2 of the 4"),
    "own_half_before_the_loss": (dict(head=OwnHalfBeforeTheLoss), of_head("OwnHalfBeforeTheLoss"), "2 of the 4"),
    "permuted": (dict(head=PermutedLogits), of_head("PermutedLogits"), "another order"),
    "permuted_before_the_loss": (dict(head=PermutedBeforeTheLoss), "PermutedBeforeTheLoss", "order"),
    "own_permuted_before_the_loss": (dict(head=OwnPermutedBeforeTheLoss), "OwnPermutedBeforeTheLoss", "order"),
    "pixels_in_one_row": (dict(head=PixelsInOneRow), of_head("PixelsInOneRow"), r"\(1, 5, 256\).*4 rows"),
    "twice_the_rows": (dict(head=TwiceTheRows), of_loss("CrossEntropyLoss", "TwiceTheRows"), "8.*4"),
    "own_twice_the_rows": (dict(head=OwnTwiceTheRows), of_head("OwnTwiceTheRows"), r"\(8, 5.*4 rows"),
    "not_of_predictions": (dict(head=NotOfPredictions), of_head("NotOfPredictions"), "none of batch_data_samples"),
    "pixel_map": (dict(head=PixelMap), of_head("PixelMap"), r"scalar for loss_own.*\(1, 8, 8\)"),
    "one_for_each_sample": (dict(head=OneForEachSample), of_head("OneForEachSample"), r"scalar for loss_own.*\(4,\)"),
    "pixel_map_loss": (dict(loss=PixelMapLoss), of_loss("PixelMapLoss"), r"scalar.*\(1, 8, 8\)"),
    "needs_pairs": (dict(head=NeedsPairs), of_head("NeedsPairs"), "IndexError: a pair needs two samples"),
    "next_pairs": (dict(head=NextPairs), of_head("NextPairs"), "another order"),
    "all_pairs": (dict(head=AllPairs), of_head("AllPairs"), "loss_pairs for the batch, but not for each"),
    "regularised": (
        dict(segmentor=RegularisedSegmentor),
        "RegularisedSegmentor",
        r"loss_weights trains backbone\.maps\.0",
    ),
    "distilling": (
        dict(segmentor=DistillingSegmentor),
        "DistillingSegmentor",
        r"decode\.loss_ce trains backbone\.maps\.0",
    ),
}


def first_step(model, pruned, batch=4):
    """The first step of a run in which the model is refused or not."""
    weigher = LossWeigher()
    views = attach_views(model, weigher)
    weigher.begin(make_weights(batch) if pruned else torch.ones(batch), pruned=pruned)
    losses = model.loss(make_inputs(batch, size=(32, 32)), make_samples(make_labels(batch, size=SIZE)))
    total(losses).backward()
    return weigher, views


@passes
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_with_advice(name, pruned):
    options, *patterns = REFUSED[name]
    with pytest.raises(ValueError) as refusal:
        first_step(model_of(**options), pruned)
    for pattern in (*patterns, ADVICE):
        refusal.match(rf"(?s){pattern}")


def neighbours(size):
    """The order in which every two neighbours have changed places."""
    return [i ^ 1 if i ^ 1 < size else i for i in range(size)]


class Reordered(FCNHead):
    """Permutes its logits, and in its loss the samples with them: each is trained on its own labels."""

    def forward(self, inputs):
        logits = super().forward(inputs)
        return logits[self.order(len(logits))]

    def loss_by_feat(self, seg_logits, batch_data_samples):
        samples = [batch_data_samples[i] for i in self.order(len(seg_logits))]
        return dict(loss_own=cross_entropy(seg_logits.float(), samples))


ORDERS = {
    "roll": lambda size: [(i - 1) % size for i in range(size)],
    "roll_back": lambda size: [(i + 1) % size for i in range(size)],
    "flip": lambda size: list(range(size))[::-1],
    "neighbours": neighbours,
    "last_two": lambda size: [*range(size - 2), *([size - 1, size - 2] if size > 1 else [0])],
}


@pytest.mark.parametrize("half_precision", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [2, 3, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_permutations_are_noticed_whatever_their_kind(order, batch, half_precision):
    model = model_of(Reordered)
    model.decode_head.order = ORDERS[order]
    refused = pytest.raises(ValueError, match=rf"(?s){of_head('Reordered')}.*another order.*{ADVICE}")
    with torch.autocast("cpu", torch.bfloat16, enabled=half_precision), refused:
        first_step(model, pruned=True, batch=batch)


@passes
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_model_can_be_given_back(name, pruned):
    options, *_ = REFUSED[name]
    model = model_of(**options)
    before = [list(vars(module)) for module in model.modules()]
    weigher = LossWeigher()
    views = attach_views(model, weigher)
    weigher.begin(make_weights(), pruned=pruned)
    with contextlib.suppress(ValueError):
        model.loss(make_inputs(size=(32, 32)), make_samples(make_labels(size=SIZE)))
    views.restore()
    views.restore()
    left = [set(vars(module)) - set(old) for module, old in zip(model.modules(), before, strict=True)]
    assert [names - {"logits"} for names in left] == [set()] * len(before)
    results = []
    for each in (model, model_of(**options)):
        losses = each.loss(make_inputs(size=(32, 32)), make_samples(make_labels(size=SIZE)))
        each.zero_grad()
        total(losses).backward()
        results.append((losses, gradients(each)))
    assert_same_tensors(results[0][0], results[1][0])
    assert_same_tensors(results[0][1], results[1][1])


@passes
def test_a_refused_model_is_refused_again(pruned):
    model = model_of(FirstHalf)
    weigher = LossWeigher()
    attach_views(model, weigher)
    for _ in range(2):
        weigher.begin(torch.ones(4), pruned=pruned)
        with pytest.raises(ValueError, match="FirstHalf"):
            model.loss(make_inputs(size=(32, 32)), make_samples(make_labels(size=SIZE)))


@passes
def test_the_proof_waits_for_a_batch_that_proves(pruned):
    """A batch of one, or one without gradients, proves nothing."""
    model = model_of(FirstHalf)
    weigher = LossWeigher()
    attach_views(model, weigher)
    weigher.begin(torch.ones(1), pruned=pruned)
    model.loss(make_inputs(1, size=(32, 32)), make_samples(make_labels(1, size=SIZE)))
    weigher.begin(torch.ones(4), pruned=pruned)
    with pytest.raises(ValueError, match="FirstHalf"):
        model.loss(make_inputs(size=(32, 32)), make_samples(make_labels(size=SIZE)))


@passes
def test_a_step_without_gradients_proves_no_coverage(pruned):
    model = model_of(segmentor=RegularisedSegmentor)
    weigher = LossWeigher()
    attach_views(model, weigher)
    batch = make_inputs(size=(32, 32)), make_samples(make_labels(size=SIZE))
    weigher.begin(torch.ones(4), pruned=pruned)
    with torch.no_grad():
        model.loss(*batch)
    weigher.begin(torch.ones(4), pruned=pruned)
    with pytest.raises(ValueError, match="RegularisedSegmentor"):
        model.loss(*batch)


class WarmedUpSegmentor(EncoderDecoder):
    """Has one more loss from its second step on."""

    steps = 0

    def loss(self, inputs, data_samples):
        losses = super().loss(inputs, data_samples)
        self.steps += 1
        if self.steps > 1:
            losses["loss_late"] = sum(each.pow(2).sum() for each in self.backbone.parameters())
        return losses


class PenalisedSegmentor(EncoderDecoder):
    """Adds its loss outside ``loss``."""

    def forward(self, inputs, data_samples=None, mode="tensor"):
        losses = super().forward(inputs, data_samples, mode)
        if mode == "loss":
            losses["loss_penalty"] = sum(each.pow(2).sum() for each in self.backbone.parameters())
        return losses


@passes
def test_a_loss_that_appears_later_is_refused_then(pruned):
    model, weigher = model_of(segmentor=WarmedUpSegmentor), LossWeigher()
    attach_views(model, weigher)
    batch = make_inputs(size=(32, 32)), make_samples(make_labels(size=SIZE))
    weigher.begin(torch.ones(4), pruned=pruned)
    model.loss(*batch)
    weigher.begin(torch.ones(4), pruned=pruned)
    with pytest.raises(ValueError, match=rf"(?s)loss_late trains backbone\.maps\.0.*{ADVICE}"):
        model.loss(*batch)


@passes
def test_a_loss_that_is_added_behind_the_models_loss_is_refused_when_it_is_parsed(pruned):
    model, weigher = model_of(segmentor=PenalisedSegmentor), LossWeigher()
    attach_views(model, weigher)
    batch = make_inputs(size=(32, 32)), make_samples(make_labels(size=SIZE))
    weigher.begin(torch.ones(4), pruned=pruned)
    losses = model.forward(*batch, mode="loss")
    with pytest.raises(ValueError, match=rf"(?s)loss_penalty trains backbone\.maps\.0.*{ADVICE}"):
        model.parse_losses(losses)
    weigher.end()
    model.parse_losses(model.forward(*batch, mode="loss"))  # validation may


@passes
def test_a_model_without_more_losses_is_parsed_as_by_the_host(pruned):
    model, host, weigher = model_of(OwnHead), model_of(OwnHead), LossWeigher()
    attach_views(model, weigher)
    batch = make_inputs(size=(32, 32)), make_samples(make_labels(size=SIZE))
    weigher.begin(torch.ones(4), pruned=pruned)
    (ours, shown), (theirs, expected) = (each.parse_losses(each.forward(*batch, mode="loss")) for each in (model, host))
    assert torch.equal(ours, theirs) and shown == expected


# ---------------------------------------------------------------- heads that only look bad


class RandomPixels(FCNHead):
    """Trains on a random half of the pixels."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = labels_of(batch_data_samples)
        labels = torch.where(torch.rand(labels.shape) < 0.5, labels, 255)
        return dict(loss_own=nn.functional.cross_entropy(seg_logits, labels, ignore_index=255))


class WithoutLabels(FCNHead):
    """A sample without a valid pixel has no part in the loss, and none alone."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = labels_of(batch_data_samples)
        kept = labels != 255
        summed = nn.functional.cross_entropy(seg_logits, labels, ignore_index=255, reduction="sum")
        return dict(loss_own=summed / kept.sum().clamp(min=1))


class ShownToo(OwnHead):
    """Shows what it does not train on, in shapes of its own."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        shown = dict(acc=seg_logits.argmax(1).float(), best=seg_logits.detach().max(), worst="none", count=3)
        return {**super().loss_by_feat(seg_logits, batch_data_samples), **shown}


class ListOfLosses(OwnHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        return dict(loss_own=[cross_entropy(k * seg_logits, batch_data_samples) for k in (1, 2)])


class OneElement(OwnHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        return dict(loss_own=cross_entropy(seg_logits, batch_data_samples)[None])


class Variadic(OwnHead):
    """Names none of its arguments."""

    def loss_by_feat(self, *outputs, **options):
        return super().loss_by_feat(*outputs, **options)


@passes
@pytest.mark.parametrize("head", [Variadic, OwnHead, RandomPixels, WithoutLabels, ShownToo, ListOfLosses, OneElement])
def test_not_refused(head, pruned, monkeypatch):
    if head is RandomPixels:  # of which nobody can see that it is a mean
        monkeypatch.setattr(registry, "_HEADS", dict(registry._HEADS))
        register_head_rule(RandomPixels, reduction="mean")
    weigher, views = first_step(model_of(head), pruned)
    assert views.not_separable == [f"decode_head ({head.__name__})"]
    scores, valid = weigher.end()
    assert scores.isfinite().all() and valid.all()


# ---------------------------------------------------------------- predictions that are written into


class ScaledHead(OwnHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        return super().loss_by_feat(seg_logits.mul(0.5), batch_data_samples)


class InPlaceHead(OwnHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        return super().loss_by_feat(seg_logits.mul_(0.5), batch_data_samples)


class ScaledLoss(nn.Module):
    loss_name = "loss_scaled"

    def forward(self, pred, label, weight=None, ignore_index=255):
        return nn.functional.cross_entropy(pred.mul(0.5), label, ignore_index=ignore_index)


class InPlaceLoss(ScaledLoss):
    def forward(self, pred, label, weight=None, ignore_index=255):
        return nn.functional.cross_entropy(pred.mul_(0.5), label, ignore_index=ignore_index)


@passes
@pytest.mark.parametrize(
    ("in_place", "out_of_place"),
    [(dict(head=InPlaceHead), dict(head=ScaledHead)), (dict(loss=InPlaceLoss), dict(loss=ScaledLoss))],
    ids=["head", "loss"],
)
def test_predictions_may_be_written_into_as_in_the_host(in_place, out_of_place, pruned):
    results = []
    for options in (in_place, out_of_place):
        model = model_of(**options)
        weigher, _ = first_step(model, pruned)
        results.append((weigher.end()[0], model.decode_head.conv_seg.weight.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
