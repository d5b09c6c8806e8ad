"""Losses that are divided by the valid elements of their batch: pruned passes are unbiased with the blank factor.

Brute force over all plans and all batches of a tiny data set, in which two samples are blank and the others equally
valid. The factor is counted here from the batches.
"""

import itertools
from fractions import Fraction

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
from mmseg.models.losses import CrossEntropyLoss
from mmseg.registry import MODELS
from oracle_losses import tiny_model

import infobatch_mm.losses.hosts.mmseg  # noqa: F401  (registers the host's own, once and for all tests)
from infobatch_mm.losses import (
    LossWeigher,
    SampleLosses,
    attach_views,
    register_loss_view,
    register_separable_loss,
    registry,
)
from infobatch_mm.losses.hosts import mmseg_losses

SAMPLES, BATCH, CLASSES, SIZE = 8, 2, 3, (2, 2)
BLANK, ABOVE, BELOW = (0, 1), (2, 3), (4, 5, 6, 7)
#: All plans: all blank samples, all above the mean, and two of the four below, which stand for the others too.
PLANS = [(*BLANK, *ABOVE, *below) for below in itertools.combinations(BELOW, 2)]
FULL = [tuple(range(SAMPLES))]
WEIGHT = len(BELOW) / 2


def batches_of(plans):
    """Each ordered pair of samples that a random order of a plan can give as a batch, and how often in a pass."""
    frequency = {}
    for plan in plans:
        pairs = list(itertools.permutations(plan, BATCH))
        for pair in pairs:
            share = Fraction(len(plan) // BATCH, len(pairs) * len(plans))
            frequency[pair] = frequency.get(pair, 0) + share
    return frequency


def test_orders_of_a_plan_give_its_pairs_alike():
    """What stands above, by walking all orders of the plans themselves."""
    counted = {}
    for plan in PLANS:
        for order in itertools.permutations(plan):
            for i in range(0, len(plan), BATCH):
                counted[order[i : i + BATCH]] = counted.get(order[i : i + BATCH], 0) + 1
    orders = len(PLANS) * 720
    assert {pair: Fraction(count, orders) for pair, count in counted.items()} == batches_of(PLANS)


def mean_share(plans):
    """E[1 / X | a valid sample is in the batch], X the number of valid samples in a batch."""
    shares = visits = Fraction(0)
    for pair, times in batches_of(plans).items():
        valid = sum(i not in BLANK for i in pair)
        if valid:
            shares, visits = shares + times * valid * Fraction(1, valid), visits + times * valid
    return shares / visits


FACTOR = float(mean_share(FULL) / mean_share(PLANS))


def test_the_factor_is_no_one():
    assert 0.8 < FACTOR < 0.95


LABELS = torch.randint(0, CLASSES, (SAMPLES, *SIZE), generator=torch.Generator().manual_seed(1))
LABELS[list(BLANK)] = 255
LOGITS = torch.randn(SAMPLES, CLASSES, *SIZE, generator=torch.Generator().manual_seed(2)).double()


class ValidMean(nn.Module):
    """A third party's mean over valid pixels."""

    loss_name = "loss_own"

    def forward(self, pred, label, weight=None, ignore_index=255, **kwargs):
        pixels = nn.functional.cross_entropy(pred, label, ignore_index=ignore_index, reduction="none")
        return pixels.sum() / (label != ignore_index).sum().clamp(min=1)


def valid_mean_view(loss, pred, label, weight=None, ignore_index=255, **kwargs):
    pixels = nn.functional.cross_entropy(pred, label, ignore_index=ignore_index, reduction="none").flatten(1).sum(1)
    counts = (label != ignore_index).flatten(1).sum(1)
    return SampleLosses(pixels, counts.sum().clamp(min=1), counts, mean_over_valid=True)


@pytest.fixture(autouse=True)
def clean_registries(monkeypatch):
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))


def cross_entropy(**options):
    return lambda: CrossEntropyLoss(avg_non_ignore=True, **options)


def registered(register):
    def make():
        register()
        return ValidMean()

    return make


def ohem():
    return MODELS.build(dict(type="OhemCrossEntropy", thres=1.0, min_kept=1))  # keeps all valid pixels


OVER_VALID = {
    "softmax": cross_entropy(),
    "sigmoid": cross_entropy(use_sigmoid=True),
    "loss_weight": cross_entropy(loss_weight=0.4),
    "registered_view": registered(lambda: register_loss_view(ValidMean)(valid_mean_view)),
    "registered_separable": registered(lambda: register_separable_loss(ValidMean, mean_over_valid=True)),
    "ohem": ohem,
}
OVER_ALL = {
    "softmax": CrossEntropyLoss,
    "sigmoid": lambda: CrossEntropyLoss(use_sigmoid=True),
    "dice": lambda: MODELS.build(dict(type="DiceLoss")),
    "tversky": lambda: MODELS.build(dict(type="TverskyLoss")),
}


class Steps:
    """Steps with one loss, weighed or the host's."""

    def __init__(self, make, factor=None):
        self.weigher = LossWeigher()
        self.loss = make()
        self.options = {} if type(self.loss).__name__ == "OhemCrossEntropy" else dict(ignore_index=255)
        self.factor = factor
        if factor is not None:
            model = tiny_model()
            model.decode_head.loss_decode = self.loss
            attach_views(model, self.weigher)

    def __call__(self, places, weights=None, pruned=True):
        """Value, gradient of the table of logits, and scores."""
        table = LOGITS.clone().requires_grad_()
        places = list(places)
        if self.factor is not None:
            weights = torch.ones(len(places)) if weights is None else weights
            self.weigher.begin(weights, pruned, blank_factor=self.factor)
        value = self.loss(table[places], LABELS[places], **self.options)
        if value.requires_grad:
            value.backward()
        gradient = torch.zeros_like(table) if table.grad is None else table.grad
        return value.detach(), gradient, self.weigher.end() if self.factor is not None else None


def expected_pass(step, plans, weigh):
    """The expected sum of the gradients of a pass over one of the plans."""
    whole = torch.zeros_like(LOGITS)
    for pair, times in batches_of(plans).items():
        weights = torch.tensor([WEIGHT if weigh and i in BELOW else 1.0 for i in pair])
        whole += float(times) * step(pair, weights)[1]
    return whole


def error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("make", OVER_VALID.values(), ids=OVER_VALID.keys())
def test_a_pruned_pass_has_the_expected_gradient_of_a_full_one(make):
    full = expected_pass(Steps(make), FULL, False)
    assert float(full.norm()) > 0
    assert error(expected_pass(Steps(make, FACTOR), PLANS, True), full) <= 1e-6
    without = expected_pass(Steps(make, 1.0), PLANS, True)
    assert error(without, full / FACTOR) <= 1e-6, "the bias that the factor takes away"


@pytest.mark.parametrize("make", OVER_ALL.values(), ids=OVER_ALL.keys())
def test_losses_that_are_divided_by_all_pixels_need_no_factor(make):
    full = expected_pass(Steps(make), FULL, False)
    assert error(expected_pass(Steps(make, FACTOR), PLANS, True), full) <= 1e-6


@pytest.mark.parametrize("make", OVER_VALID.values(), ids=OVER_VALID.keys())
def test_the_factor_changes_neither_values_nor_scores_nor_full_passes(make):
    weights, places = torch.tensor([1.0, 2.0, 1.0]), (0, 4, 2)
    with_factor, without = Steps(make, FACTOR)(places, weights), Steps(make, 1.0)(places, weights)
    assert torch.equal(with_factor[0], without[0])
    assert torch.equal(with_factor[2][0], without[2][0]) and torch.equal(with_factor[2][1], without[2][1])
    assert error(with_factor[1], FACTOR * without[1]) <= 1e-6
    full = [Steps(make, factor)(places, None, False) for factor in (FACTOR, 1.0)]
    assert torch.equal(full[0][0], full[1][0]) and torch.equal(full[0][1], full[1][1])


@pytest.mark.parametrize("counted", [False, True])
def test_class_weights_are_added_up_over_valid_pixels_where_the_host_does(counted, monkeypatch):
    monkeypatch.setattr(mmseg_losses, "_counts_ignored_pixels", lambda: counted)
    weight = torch.ones(CLASSES)

    def decided(**options):
        return mmseg_losses._is_mean_over_valid(
            **dict(binary=False, reduction="mean", avg_factor=None, class_weight=weight, avg_non_ignore=False) | options
        )

    assert decided() is not counted
    assert decided(avg_non_ignore=True)
    assert not decided(class_weight=None) and not decided(binary=True)
    assert not decided(avg_non_ignore=True, reduction="sum") and not decided(avg_non_ignore=True, avg_factor=3.0)


def test_tasks_are_divided_by_the_samples_that_have_them():
    """Of a multi-task head, whose blank samples have no task."""
    weigher = LossWeigher()
    gradients, values = [], []
    for factor in (1.0, 0.5):
        weigher.begin(torch.tensor([1.0, 2.0, 1.0]), blank_factor=factor)
        losses = torch.tensor([1.0, 3.0], requires_grad=True)
        with weigher.narrowed([0, 1]):
            value = weigher.weigh(losses, losses.mean(), 2.0)
            value.backward()
        gradients.append(losses.grad)
        values.append(value.detach())
        weigher.end()
    assert torch.equal(gradients[1], gradients[0] / 2) and torch.equal(*values)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_no_factor_at_all_is_refused(factor):
    with pytest.raises(ValueError, match=r"blank_factor=.*expected a positive number"):
        LossWeigher().begin(torch.ones(2), blank_factor=factor)


def test_core_knows_the_same_factor():
    blanks = pytest.importorskip("infobatch_mm.core.blanks")
    factor = blanks.blank_factor(SAMPLES, len(BLANK), len(PLANS[0]), len(BLANK), BATCH)
    assert factor == pytest.approx(FACTOR, rel=1e-12)
