"""Heads, losses and classifiers that mmpretrain does not ship: weighed where they can be, else refused by name."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

pytest.importorskip("mmpretrain")
from mmengine.model import BaseModule
from mmpretrain.models import CrossEntropyLoss, ImageClassifier, LabelSmoothLoss
from mmpretrain.models.classifiers import BaseClassifier
from mmpretrain.models.heads import LinearClsHead
from mmpretrain.registry import MODELS
from oracle_losses import passes, shown_by_own
from oracle_mmpretrain import (
    BATCH,
    NUM_CLASSES,
    ONES,
    WEIGHTS,
    TinyBackbone,
    assert_same_gradients,
    assert_same_step,
    assert_scores,
    assert_shows,
    build,
    classifier,
    labelled,
    linear_head,
    losses_alone,
    make_inputs,
    make_labels,
    oracle_step,
    relative_error,
    take_step,
    with_tasks,
)

from infobatch_mm.losses import LossWeigher, attach_views

ADVICE = r"docs/losses\.md"


def samples():
    return labelled(make_labels())


def labels_of(data_samples):
    return torch.cat([sample.gt_label for sample in data_samples])


def cross_entropies(logits, data_samples):
    return nn.functional.cross_entropy(logits, labels_of(data_samples), reduction="none")


# ---------------------------------------------------------------- heads that can be weighed


class MeanHead(LinearClsHead):
    """Computes its loss itself, a mean over samples."""

    def _get_loss(self, cls_score, data_samples, **kwargs):
        return dict(loss=cross_entropies(cls_score, data_samples).mean())


class SumHead(LinearClsHead):
    def _get_loss(self, cls_score, data_samples, **kwargs):
        return dict(loss=cross_entropies(cls_score, data_samples).sum())


class CoupledHead(LinearClsHead):
    """Divides by what it finds in the batch: this loss is no sum over samples."""

    def _get_loss(self, cls_score, data_samples, **kwargs):
        confidence = cls_score.detach().softmax(1).amax(1)
        return dict(loss=(confidence * cross_entropies(cls_score, data_samples)).sum() / confidence.sum())


class TwoLossesHead(LinearClsHead):
    """A mean and a sum, beside a number that is only shown."""

    def _get_loss(self, cls_score, data_samples, **kwargs):
        losses = super()._get_loss(cls_score, data_samples, **kwargs)
        losses["loss_size"] = 0.1 * cls_score.pow(2).sum()
        losses["largest"] = cls_score.max()
        return losses


class DecayedHead(LinearClsHead):
    """A term on its own parameters."""

    def _get_loss(self, cls_score, data_samples, **kwargs):
        losses = super()._get_loss(cls_score, data_samples, **kwargs)
        losses["loss_decay"] = 0.1 * self.fc.weight.pow(2).sum()
        return losses


class OwnLossHead(LinearClsHead):
    """A ``loss`` of its own, from the features."""

    def loss(self, feats, data_samples, **kwargs):
        return dict(loss_own=cross_entropies(self.fc(feats[-1]) / 2, data_samples).mean())


class MoreLossHead(LinearClsHead):
    """A ``loss`` that adds a term to its parent's."""

    def loss(self, feats, data_samples, **kwargs):
        losses = super().loss(feats, data_samples, **kwargs)
        losses["loss_features"] = 0.1 * feats[-1].pow(2).mean()
        return losses


class StrangerHead(BaseModule):
    """Not one of the host's heads at all."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, NUM_CLASSES)

    def loss(self, feats, data_samples):
        return dict(loss=cross_entropies(self.fc(feats[0]), data_samples).mean())


class SameHead(LinearClsHead):
    """Nothing of its own where losses are computed: weighed as its parent is."""

    def forward(self, feats):
        return 2 * super().forward(feats)


# ---------------------------------------------------------------- losses that can be weighed


class BrierLoss(nn.Module):
    """Squared error of the probabilities, a mean over samples; it knows nothing of ``avg_factor``."""

    def forward(self, pred, target, **kwargs):
        return (pred.softmax(1) - nn.functional.one_hot(target, NUM_CLASSES)).pow(2).sum(1).mean()


class SumBrierLoss(BrierLoss):
    def forward(self, pred, target, **kwargs):
        return len(pred) * super().forward(pred, target)


class PositiveLoss(nn.Module):
    """Divides by a number of the batch: not a sum over samples."""

    def forward(self, pred, target, avg_factor=None):
        return nn.functional.cross_entropy(pred, target, reduction="sum") / (1 + (target > 1)).sum()


class OwnCrossEntropyLoss(CrossEntropyLoss):
    """A ``forward`` of its own."""

    def forward(self, cls_score, label, **kwargs):
        return super().forward(cls_score / 2, label, **kwargs)


class SameCrossEntropyLoss(CrossEntropyLoss):
    """Nothing of its own."""


class SameLabelSmoothLoss(LabelSmoothLoss):
    """Smooths in its own way, which the loss below it does not mind."""

    def original_smooth_label(self, one_hot_like_label):
        return super().original_smooth_label(one_hot_like_label).roll(1, 1)


def own_criterion(pred, label, weight=None, reduction="mean", avg_factor=None, class_weight=None):
    return nn.functional.multi_margin_loss(pred, label)


def with_criterion():
    loss = CrossEntropyLoss(loss_weight=0.5)
    loss.cls_criterion = own_criterion
    return loss


class CountingLoss(nn.Module):
    """Remembers a moving average of what it saw, and is scaled by it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.ones(()))

    def forward(self, pred, target, avg_factor=None):
        loss = nn.functional.cross_entropy(pred, target)
        self.average = 0.9 * self.average + 0.1 * loss.detach()
        return loss


def with_head(cls, dtype=torch.float64):
    model = build(classifier(linear_head()), dtype)
    if issubclass(cls, LinearClsHead):
        model.head.__class__ = cls
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.head = cls().to(dtype)
    return model


def with_loss(make, dtype=torch.float64):
    model = build(classifier(linear_head()), dtype)
    model.head.loss_module = make().to(dtype)
    return model


@dataclass
class Case:
    """A model's maker, what the host's loss of a sample alone is divided by, and what is known of the views."""

    part: type
    divisor: int | dict = BATCH  # by the key of the loss, where they differ
    vectorised: bool = False
    separable: bool = False  # whether it is a sum over samples, so that both kinds of pass are alike
    title: str = ""
    options: dict = field(default_factory=dict)

    def model(self, dtype=torch.float64):
        is_head = isinstance(self.part, type) and hasattr(self.part, "loss")
        return (with_head if is_head else with_loss)(self.part, dtype)


CASES = {
    "mean": Case(MeanHead, separable=True, title="head (MeanHead)"),
    "sum": Case(SumHead, 1, separable=True, title="head (SumHead)"),
    "coupled": Case(CoupledHead, title="head (CoupledHead)"),
    "two_losses": Case(TwoLossesHead, dict(loss=BATCH, loss_size=1), separable=True, title="head (TwoLossesHead)"),
    "decayed": Case(DecayedHead, title="head (DecayedHead)"),
    "own_loss": Case(OwnLossHead, separable=True, title="head (OwnLossHead)"),
    "more_loss": Case(MoreLossHead, separable=True, title="head (MoreLossHead)"),
    "stranger": Case(StrangerHead, separable=True, title="head (StrangerHead)"),
    "same_head": Case(SameHead, vectorised=True, separable=True),
    "brier": Case(BrierLoss, separable=True, title="head.loss_module (BrierLoss of LinearClsHead)"),
    "sum_brier": Case(SumBrierLoss, 1, separable=True, title="head.loss_module (SumBrierLoss of LinearClsHead)"),
    "positive": Case(PositiveLoss, title="head.loss_module (PositiveLoss of LinearClsHead)"),
    "own_ce": Case(
        OwnCrossEntropyLoss, separable=True, title="head.loss_module (OwnCrossEntropyLoss of LinearClsHead)"
    ),
    "same_ce": Case(SameCrossEntropyLoss, vectorised=True, separable=True),
    "same_smooth": Case(lambda: SameLabelSmoothLoss(0.1), vectorised=True, separable=True),
    "criterion": Case(with_criterion, separable=True, title="head.loss_module (CrossEntropyLoss of LinearClsHead)"),
    "counting": Case(CountingLoss, separable=True, title="head.loss_module (CountingLoss of LinearClsHead)"),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def attached(model):
    weigher = LossWeigher()
    return weigher, attach_views(model, weigher)


def step(model, weigher=None, weights=None, pruned=False):
    inputs = make_inputs(dtype=next(model.parameters()).dtype)
    return take_step(model, lambda: model.loss(inputs, samples()), weigher, weights, pruned)


def own_losses(case, model, inputs):
    """The losses of samples alone, and those by what the host divides each by."""
    parts, whole = [], []
    for i in range(BATCH):
        losses = model.loss(inputs[i : i + 1], samples()[i : i + 1])
        terms = {key: value for key, value in losses.items() if "loss" in key}
        divisors = {key: case.divisor[key] if isinstance(case.divisor, dict) else case.divisor for key in terms}
        whole.append(sum(terms.values()))
        parts.append(sum(value / divisors[key] for key, value in terms.items()))
    return whole, parts


def oracle(case, weights, dtype=torch.float64):
    model = case.model(dtype)
    whole, parts = own_losses(case, model, make_inputs(dtype=dtype))
    expected = oracle_step(model, parts, weights, 1)
    expected.scores = torch.stack(whole).detach().double()
    return expected


def oracle_value(case, weights):
    """What a pruned pass shows: each loss of the host by the mean of the samples' own by weights."""
    model, inputs = case.model(), make_inputs(dtype=torch.float64)
    whole = model.loss(inputs, samples())
    own = [model.loss(inputs[i : i + 1], samples()[i : i + 1]) for i in range(BATCH)]
    return sum(shown_by_own(whole[key], [each[key] for each in own], weights) for key in whole if "loss" in key)


@every_case
def test_a_full_pass_is_the_hosts(case):
    model, host = case.model(torch.float32), case.model(torch.float32)
    weigher, _ = attached(model)
    for _ in range(2):  # the first step proves, the second does not
        ours = step(model, weigher, ONES)
        assert_same_step(ours, step(host))
        assert ours.scores is not None
    for name, buffer in host.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name


@every_case
def test_a_pruned_pass_shows_the_mean_by_weights_and_optimises_the_weighted_losses(case):
    model, host = case.model(), case.model()
    weigher, _ = attached(model)
    for _ in range(2):
        ours = step(model, weigher, WEIGHTS, True)
        assert list(ours.log) == list(step(host).log)
        assert ours.loss == pytest.approx(oracle_value(case, WEIGHTS), rel=2e-6)
        assert_same_gradients(ours, oracle(case, WEIGHTS), torch.float64)


@every_case
def test_full_and_pruned_passes_differ_for_losses_that_are_no_sums_over_samples(case):
    model = case.model()
    weigher, _ = attached(model)
    error = relative_error(step(model, weigher, ONES, True), step(case.model()))
    assert (error <= 1e-12) if case.separable or case.part is DecayedHead else (error > 1e-3)


@passes
@every_case
def test_scores_are_the_hosts_losses_of_samples_alone(case, pruned):
    model = case.model(torch.float32)
    weigher, _ = attached(model)
    ours = step(model, weigher, WEIGHTS if pruned else ONES, pruned)
    assert_scores(ours, oracle(case, ONES).scores)


@every_case
def test_which_way_each_goes_is_told(case):
    _, views = attached(case.model())
    assert views.vectorised == case.vectorised
    assert views.not_separable == ([case.title] if case.title else [])


@every_case
def test_models_are_given_back(case):
    model, host = case.model(torch.float32), case.model(torch.float32)
    step(model), step(host)  # what they learn by themselves
    model.zero_grad()
    before = [dict(vars(module)) for module in model.modules()]
    weigher, views = attached(model)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    step(model, weigher, WEIGHTS, True)
    assert not views.renew()
    views.restore()
    for module, old in zip(model.modules(), before, strict=True):
        assert list(vars(module)) == list(old)
        assert all(vars(module)[key] is value for key, value in old.items())
    model.load_state_dict(buffers, strict=False)
    weigher.begin(WEIGHTS)
    assert relative_error(step(model), step(host)) == 0
    assert weigher.end() == (None, None)


# ---------------------------------------------------------------- in a task of a multi-task head


@passes
@pytest.mark.parametrize("name", ["mean", "sum", "coupled", "brier", "sum_brier", "positive"])
def test_heads_and_losses_of_ones_own_are_weighed_in_a_task(name, pruned):
    case, weights = CASES[name], WEIGHTS if pruned else ONES

    def make():
        return build(classifier(dict(type="MultiTaskHead", task_heads=dict(own=dressed(case), other=linear_head()))))

    def batch():
        each = [with_tasks(dict(own=own, other=other)) for own, other in zip(samples(), samples(), strict=True)]
        each[1] = with_tasks(dict(other=samples()[1]))
        return each

    model, host = make(), make()
    weigher, _ = attached(model)
    ours = take_step(model, lambda: model.loss(make_inputs(), batch()), weigher, weights, pruned)
    theirs = take_step(host, lambda: host.loss(make_inputs(), batch()))
    if not pruned:
        assert_shows(ours, theirs)
    feats, parts, scores = host.extract_feat(make_inputs()), [], []
    for i, sample in enumerate(batch()):
        part = score = 0.0
        for key, head in host.head.task_heads.items():
            if key in sample:
                loss = type(head).loss(head, tuple(feat[i : i + 1] for feat in feats), [sample.get(key)])["loss"]
                divisor = BATCH if key == "other" else 3 if case.divisor == BATCH else 1
                part, score = part + loss / divisor, score + loss
        parts.append(part)
        scores.append(score)
    assert_scores(ours, torch.stack(scores).detach())
    assert_same_gradients(ours, oracle_step(host, parts, weights, 1) if pruned else theirs, torch.float32)


def dressed(case):
    """The head of a case, as a module: not wrapped by a multi-task head yet."""
    return case.model(torch.float32).head


def test_a_task_head_with_a_loss_of_its_own_is_refused():
    head = dict(type="MultiTaskHead", task_heads=dict(own=dressed(CASES["own_loss"])))
    with pytest.raises(ValueError, match=rf"head\.task_heads\.own \(OwnLossHead\) cannot be weighed.*{ADVICE}"):
        attached(build(classifier(head)))


# ---------------------------------------------------------------- heads that cannot be weighed


class FirstHalf(LinearClsHead):
    def _get_loss(self, cls_score, data_samples, **kwargs):
        half = (len(cls_score) + 1) // 2
        return dict(loss=cross_entropies(cls_score[:half], data_samples[:half]).mean())


class HardestHalf(LinearClsHead):
    def _get_loss(self, cls_score, data_samples, **kwargs):
        losses = cross_entropies(cls_score, data_samples)
        return dict(loss=losses.topk((len(losses) + 1) // 2).values.mean())


class HalfBeforeTheLossModule(LinearClsHead):
    def forward(self, feats):
        return super().forward(feats)[:2]

    def loss(self, feats, data_samples, **kwargs):
        return self._get_loss(self(feats), data_samples[:2], **kwargs)


class Neighbours(LinearClsHead):
    """Each prediction with the label of the next sample: a mixing of one's own."""

    def _get_loss(self, cls_score, data_samples, **kwargs):
        return dict(loss=cross_entropies(cls_score, [*data_samples[1:], data_samples[0]]).mean())


class Permuted(LinearClsHead):
    """Another order of both, in which the loss is computed."""

    def loss(self, feats, data_samples, **kwargs):
        return self._get_loss(self(feats).flip(0), data_samples[::-1], **kwargs)


class Elements(LinearClsHead):
    def _get_loss(self, cls_score, data_samples, **kwargs):
        return dict(loss=cross_entropies(cls_score, data_samples))


class TwiceTheRows(LinearClsHead):
    def forward(self, feats):
        logits = super().forward(feats)
        return torch.cat([logits, logits])

    def _get_loss(self, cls_score, data_samples, **kwargs):
        return dict(loss=cross_entropies(cls_score, 2 * data_samples).mean())


class BatchNormHead(LinearClsHead):
    """Cannot be evaluated on one sample."""

    def loss(self, feats, data_samples, **kwargs):
        feats = nn.functional.batch_norm(feats[-1], None, None, training=True)
        return dict(loss=cross_entropies(self.fc(feats), data_samples).mean())


REFUSED_HEADS = {
    "first_half": (FirstHalf, r"head \(FirstHalf\).*(another order|no part in the loss)"),
    "hardest_half": (HardestHalf, r"head \(HardestHalf\).*no part in the loss"),
    "half": (HalfBeforeTheLossModule, r"head \(HalfBeforeTheLossModule\).*another order"),
    "neighbours": (Neighbours, r"head \(Neighbours\).*another order"),
    "elements": (Elements, r"head \(Elements\) cannot be weighed: expected a scalar for loss, got the shape"),
    "twice_the_rows": (TwiceTheRows, r"head \(TwiceTheRows\).* is a prediction of shape \(8, 5\), expected 4 rows"),
    "batch_norm": (BatchNormHead, r"head \(BatchNormHead\) cannot be weighed: it could not be evaluated on sample 0"),
}


@passes
@pytest.mark.parametrize(("head", "message"), REFUSED_HEADS.values(), ids=REFUSED_HEADS.keys())
def test_a_head_that_is_no_mean_over_samples_is_refused_in_the_first_step(head, message, pruned):
    model = with_head(head)
    weigher, _ = attached(model)
    with pytest.raises(ValueError, match=f"{message}.*{ADVICE}"):
        step(model, weigher, WEIGHTS, pruned)


def test_a_head_that_permutes_its_samples_within_its_own_loss_is_weighed_as_they_are():
    """Its whole ``loss`` is evaluated on samples: what order it takes them in is its own affair."""
    model, host = with_head(Permuted), with_head(Permuted)
    weigher, _ = attached(model)
    ours = step(model, weigher, WEIGHTS, True)
    expected = oracle_step(host, losses_alone(host, make_inputs(dtype=torch.float64), samples()), WEIGHTS)
    assert_same_gradients(ours, expected, torch.float64)
    assert_scores(ours, expected.scores)


# ---------------------------------------------------------------- losses that cannot be weighed


class Unreduced(nn.Module):
    def forward(self, pred, target, avg_factor=None):
        return nn.functional.cross_entropy(pred, target, reduction="none")


class Hardest(nn.Module):
    def forward(self, pred, target, avg_factor=None):
        return nn.functional.cross_entropy(pred, target, reduction="none").max()


class Shifted(nn.Module):
    def forward(self, pred, target, avg_factor=None):
        return nn.functional.cross_entropy(pred, target.roll(1))


@passes
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Unreduced, "expected a scalar for its loss, got the shape"),
        (Hardest, "no part in the loss of the batch"),
        (Shifted, "for the same samples in another order"),
    ],
)
def test_a_loss_that_is_no_mean_over_samples_is_refused_in_the_first_step(loss, message, pruned):
    model = with_loss(loss)
    weigher, _ = attached(model)
    with pytest.raises(ValueError, match=rf"head\.loss_module \({loss.__name__} of LinearClsHead\).*{message}"):
        step(model, weigher, WEIGHTS, pruned)


# ---------------------------------------------------------------- classifiers


class Regularised(ImageClassifier):
    """A term that no head knows of."""

    def loss(self, inputs, data_samples):
        losses = super().loss(inputs, data_samples)
        losses["loss_reg"] = 0.1 * self.backbone.conv.weight.pow(2).sum()
        return losses


class RegularisedLater(ImageClassifier):
    def parse_losses(self, losses):
        return super().parse_losses(losses | dict(loss_reg=0.1 * self.backbone.conv.weight.pow(2).sum()))


class RegularisedForward(ImageClassifier):
    def forward(self, inputs, data_samples=None, mode="tensor"):
        losses = super().forward(inputs, data_samples, mode)
        return losses | dict(loss_reg=0.1 * self.backbone.conv.weight.pow(2).sum())


class WithAuxiliaryHead(ImageClassifier):
    def loss(self, inputs, data_samples):
        feats = self.extract_feat(inputs)
        losses = self.head.loss(feats, data_samples)
        losses["loss_aux"] = cross_entropies(feats[-1][:, :NUM_CLASSES], data_samples).mean()
        return losses


class HalfTheBatch(ImageClassifier):
    def loss(self, inputs, data_samples):
        return super().loss(inputs[:2], data_samples[:2])


@passes
@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Regularised, r"Regularised has a loss that no view weighs: loss_reg trains backbone\.conv\.weight without"),
        (
            RegularisedForward,
            r"RegularisedForward has a loss that no view weighs: loss_reg trains backbone\.conv\.weight",
        ),
        (
            RegularisedLater,
            r"RegularisedLater has a loss that no view weighs: the total of parse_losses trains backbone\.conv\.weight",
        ),
        (WithAuxiliaryHead, r"WithAuxiliaryHead has a loss that no view weighs: loss_aux trains backbone\.conv\."),
        (HalfTheBatch, r"head \(LinearClsHead\).*2 of the 4 data samples"),
    ],
)
def test_a_classifier_with_more_or_less_than_its_heads_losses_is_refused(cls, message, pruned):
    model = build(classifier(linear_head()))
    model.__class__ = cls
    weigher, _ = attached(model)
    with pytest.raises(ValueError, match=f"{message}.*{ADVICE}"):
        take_step(model, lambda: model(make_inputs(), samples(), mode="loss"), weigher, WEIGHTS, pruned)


class Headless(BaseClassifier):
    """A classifier of one's own that calls its loss module itself."""

    def __init__(self):
        super().__init__(data_preprocessor=dict(type="mmpretrain.ClsDataPreprocessor"))
        self.backbone, self.loss_module = TinyBackbone(), MODELS.build(dict(type="CrossEntropyLoss"))

    def forward(self, inputs, data_samples=None, mode="tensor"):
        raise NotImplementedError

    def loss(self, inputs, data_samples):
        return self.losses_of(self.backbone(inputs)[0][:, :NUM_CLASSES], labels_of(data_samples))

    def losses_of(self, logits, labels):
        return dict(loss=self.loss_module(logits, labels))


class AsTheHosts(Headless):
    """With the method that the host's own have."""

    def loss(self, inputs, data_samples):
        return self._get_loss(self.backbone(inputs)[0][:, :NUM_CLASSES], data_samples)

    def _get_loss(self, cls_score, data_samples):
        return self.losses_of(cls_score, labels_of(data_samples))


class PermutedHeadless(AsTheHosts):
    """Another order of both, in which the loss module sees them."""

    def losses_of(self, logits, labels):
        order = [1, 2, 3, 0]
        return super().losses_of(logits[order], labels[order])


class HalfHeadless(AsTheHosts):
    def losses_of(self, logits, labels):
        return super().losses_of(logits[:2], labels[:2])


class HalfWeighedHeadless(AsTheHosts):
    """Uses its loss module for a part of its loss only."""

    def losses_of(self, logits, labels):
        return dict(loss=super().losses_of(logits, labels)["loss"] + 0.1 * logits.pow(2).mean())


def headless(cls):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls().train()


@pytest.mark.parametrize("cls", [AsTheHosts, Headless, HalfWeighedHeadless])
def test_a_classifier_without_a_head_is_weighed_by_its_loss_module(cls):
    model, host = headless(cls), headless(cls)
    weigher, _ = attached(model)
    ours = step(model, weigher, WEIGHTS, True)
    expected = oracle_step(host, losses_alone(host, make_inputs(), samples()), WEIGHTS)
    assert_same_gradients(ours, expected, torch.float32)
    assert_scores(ours, expected.scores)


@passes
@pytest.mark.parametrize("cls", [PermutedHeadless, HalfHeadless])
def test_a_classifier_without_a_head_that_is_no_mean_over_samples_is_refused(cls, pruned):
    model = headless(cls)
    weigher, _ = attached(model)
    with pytest.raises(ValueError, match=ADVICE):
        step(model, weigher, WEIGHTS, pruned)
