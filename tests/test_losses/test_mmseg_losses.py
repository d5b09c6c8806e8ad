"""Every loss of mmseg, weighed: against the untouched host in full passes, and in pruned ones against an oracle."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
from mmseg.models.losses.kldiv_loss import KLDivLoss
from mmseg.registry import MODELS
from oracle import NUM_CLASSES, make_labels, make_weights
from oracle_losses import (
    losses_alone,
    make_edges,
    shares_of_avg_factor,
    shares_of_mean,
    shares_of_ohem,
    shares_of_sum,
    shown,
    shown_by_own,
    tiny_model,
    weighted,
    weighted_mean,
)

from infobatch_mm.losses import LossWeigher, attach_views

BATCH, SIZE = 4, (6, 6)


def labels_of(batch=BATCH, classes=NUM_CLASSES, blank=None):
    return make_labels(batch, SIZE, classes, blank=blank)


def binary_labels(blank=None):
    return labels_of(classes=2, blank=blank)


def one_hot(blank=None):
    """Targets of the predictions' shape."""
    return nn.functional.one_hot(labels_of().clamp(max=NUM_CLASSES - 1), NUM_CLASSES).permute(0, 3, 1, 2)


def mask(blank=None):
    return make_edges(labels_of())[:, None]


def edges(blank=None):
    return make_edges(labels_of())


def logits_target(blank=None):
    return torch.randn(BATCH, NUM_CLASSES, *SIZE, generator=torch.Generator().manual_seed(8)).double()


def depths(blank=None):
    """Depths, a tenth of which is missing; all of sample ``blank``."""
    generator = torch.Generator().manual_seed(9)
    target = 0.5 + 5 * torch.rand(BATCH, 1, *SIZE, generator=generator).double()
    target[torch.rand(target.shape, generator=generator) < 0.1] = 0
    if blank is not None:
        target[blank] = 0
    return target


def sharp(pred):
    """Confident predictions, so that thresholds part them."""
    return 3 * pred


@dataclass
class Case:
    """A loss, what it is called with, and what the samples contribute to it."""

    loss: dict
    parts: Callable | None = shares_of_mean  # None: not separable
    target: Callable = labels_of
    channels: int = NUM_CLASSES
    call: dict = field(default_factory=lambda: dict(ignore_index=255))
    pred: Callable = lambda pred: pred
    vectorised: bool = True
    double: bool = True  # whether the host computes in float64 where it is given float64
    blank: bool = True  # whether the host takes a batch with a sample that has no valid pixel

    def batch(self, dtype=torch.float64, blank=None):
        generator = torch.Generator().manual_seed(7)
        pred = self.pred(2 * torch.randn(BATCH, self.channels, *SIZE, generator=generator))
        target = self.target(blank=blank)
        if target.is_floating_point():
            target = target.to(dtype)
        return pred.to(dtype).detach().requires_grad_(), target

    def module(self):
        return MODELS.build(self.loss)


def dice(**options):
    return dict(type="DiceLoss", **options)


def focal(**options):
    return dict(type="FocalLoss", **options)


def tversky(**options):
    return dict(type="TverskyLoss", **options)


def lovasz(**options):
    return dict(type="LovaszLoss", **options)


def ohem(**options):
    return dict(type="OhemCrossEntropy", **options)


CLASS_WEIGHT = [0.5, 1.0, 2.5, 0.1, 1.7]
NO_OPTIONS = dict(call={})
OHEM = dict(parts=shares_of_ohem, pred=sharp, vectorised=False, **NO_OPTIONS)
# The host computes Lovasz in float32; it stacks the images' losses, but an image without a valid pixel gives none.
PER_IMAGE = dict(double=False, blank=False)
# The host's distance maps are float32.
HAUSDORFF = dict(vectorised=False, double=False)
BATCH_LOVASZ = dict(parts=None, vectorised=False, double=False)
SILOG = dict(target=depths, channels=1, pred=lambda pred: pred.abs() + 0.1, **NO_OPTIONS)

CASES = {
    "dice_sigmoid": Case(dice()),
    "dice_softmax": Case(dice(use_sigmoid=False, loss_weight=0.4)),
    "dice_naive": Case(dice(use_sigmoid=False, naive_dice=True)),
    "dice_not_activated": Case(dice(activate=False), pred=lambda pred: pred.sigmoid()),
    "dice_ignored_class": Case(dice(use_sigmoid=False, ignore_index=0)),
    "dice_sum": Case(dice(reduction="sum"), shares_of_sum),
    "dice_one_hot": Case(dice(), target=one_hot),
    "dice_one_channel": Case(dice(), target=binary_labels, channels=1),
    "focal_labels": Case(focal()),
    "focal_one_hot": Case(focal(class_weight=CLASS_WEIGHT, alpha=[0.2, 0.3, 0.4, 0.5, 0.6]), target=one_hot),
    "focal_mask": Case(focal(gamma=1.5, alpha=0.3, loss_weight=0.4), target=mask, channels=1),
    "focal_sum": Case(focal(reduction="sum"), shares_of_sum, target=one_hot),
    "focal_avg_factor": Case(
        focal(), shares_of_avg_factor, target=one_hot, call=dict(ignore_index=255, avg_factor=17.0)
    ),
    "tversky": Case(tversky(), vectorised=False),
    "tversky_class_weight": Case(tversky(class_weight=CLASS_WEIGHT, alpha=0.4, beta=0.6), vectorised=False),
    "tversky_ignored_class": Case(tversky(ignore_index=0, loss_weight=0.4), vectorised=False),
    "lovasz_per_image": Case(lovasz(per_image=True), **PER_IMAGE),
    "lovasz_per_image_sum": Case(lovasz(per_image=True, reduction="sum"), shares_of_sum, **PER_IMAGE),
    "lovasz_per_image_all_classes": Case(lovasz(per_image=True, classes="all", class_weight=CLASS_WEIGHT), **PER_IMAGE),
    "lovasz_per_image_binary": Case(
        lovasz(loss_type="binary", per_image=True, loss_weight=0.4), target=binary_labels, channels=1, double=False
    ),
    "lovasz_batch": Case(lovasz(reduction="none"), **BATCH_LOVASZ),
    "lovasz_batch_all_classes": Case(lovasz(reduction="none", classes="all", loss_weight=0.4), **BATCH_LOVASZ),
    "lovasz_batch_binary": Case(
        lovasz(loss_type="binary", reduction="none"), target=binary_labels, channels=1, **BATCH_LOVASZ
    ),
    "kldiv_mean": Case(dict(type="KLDivLoss", temperature=2.0), target=logits_target, **NO_OPTIONS),
    "kldiv_sum": Case(dict(type="KLDivLoss", reduction="sum"), target=logits_target, **NO_OPTIONS),
    "kldiv_none": Case(dict(type="KLDivLoss", reduction="none"), target=logits_target, **NO_OPTIONS),
    "boundary": Case(
        dict(type="BoundaryLoss", loss_weight=20.0), None, target=edges, channels=1, vectorised=False, **NO_OPTIONS
    ),
    "hausdorff": Case(dict(type="HuasdorffDisstanceLoss"), **HAUSDORFF),
    "hausdorff_options": Case(dict(type="HuasdorffDisstanceLoss", loss_weight=0.4, ignore_index=0), **HAUSDORFF),
    "ohem_keeps_all": Case(ohem(), **OHEM),
    "ohem_threshold": Case(ohem(thres=0.3, min_kept=5), **OHEM),
    "ohem_min_kept": Case(ohem(thres=0.01, min_kept=30), **OHEM),
    "ohem_class_weight": Case(ohem(thres=0.3, min_kept=5, class_weight=CLASS_WEIGHT, loss_weight=0.4), **OHEM),
    "silog": Case(dict(type="SiLogLoss"), **SILOG),
    "silog_sum": Case(dict(type="SiLogLoss", reduction="sum", loss_weight=0.4), shares_of_sum, **SILOG),
}


def parametrized(keep=lambda case: True):
    """All cases of a kind; those that the installed host cannot run are skipped with its own words."""
    params = []
    for name, case in CASES.items():
        if keep(case):
            reason = why_the_host_cannot_run(case)
            marks = [pytest.mark.skip(reason=f"the host itself cannot run this: {reason}")] if reason else []
            params.append(pytest.param(case, id=name, marks=marks))
    return pytest.mark.parametrize("case", params)


def why_the_host_cannot_run(case):
    """The fork's focal loss on the CPU, for example, takes no labels."""
    try:
        host_step(case, case.batch(torch.float32))
    except (RuntimeError, ValueError) as error:
        return str(error)


def labelled(case):
    return case.target in (labels_of, binary_labels)


def attached(case):
    """A model with the loss, its loss module, its views and their weigher."""
    model, weigher = tiny_model(), LossWeigher()
    model.decode_head.loss_decode = case.module()
    return model.decode_head.loss_decode, weigher, attach_views(model, weigher)


def host_step(case, batch):
    """Value and gradient of the untouched host, as it would optimise them."""
    pred, target = batch
    pred = pred.detach().clone().requires_grad_()
    loss = case.module()(pred, target, **case.call).mean()
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), pred.grad


every_case = parametrized()


def our_step(case, batch, weights, pruned):
    """Value, gradient, and what the weigher has to say."""
    pred, target = batch
    pred = pred.detach().clone().requires_grad_()
    module, weigher, _ = attached(case)
    weigher.begin(weights, pruned=pruned)
    loss = module(pred, target, **case.call).mean()
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), pred.grad, weigher.end()


def oracle_gradient(case, batch, weights):
    pred, target = batch
    pred, module = pred.detach().clone().requires_grad_(), case.module()
    if case.parts is None:
        objective = weighted_mean(losses_alone(module, BATCH, pred, target, **case.call), weights)
    else:
        objective = weighted(case.parts(module, pred, target, **case.call), weights)
    objective.backward()
    return pred.grad


def oracle_value(case, batch, weights, valid=None):
    """What is shown in a pruned pass; samples that are not valid have no loss of their own."""
    module, (pred, target) = case.module(), batch
    if case.parts is not None:
        return shown(case.parts(module, pred, target, **case.call), weights)
    own = losses_alone(module, BATCH, pred, target, **case.call)
    own = [each if valid is None or valid[i] else torch.zeros(()) for i, each in enumerate(own)]
    return shown_by_own(host_step(case, batch)[0], own, weights)


def assert_close(actual, expected, tolerance):
    assert float(expected.norm()) > 0
    error = float((actual - expected).norm() / expected.norm())
    assert error <= tolerance, error


def tolerance_of(case, dtype):
    return 1e-9 if case.double and dtype == torch.float64 else 1e-5


# ---------------------------------------------------------------- values and gradients


@parametrized(lambda case: case.parts)
def test_contributions_of_the_reference_add_up_to_the_host_loss(case):
    pred, target = case.batch() if case.double else case.batch(torch.float32)
    parts = case.parts(case.module(), pred, target, **case.call)
    tolerance = tolerance_of(case, pred.dtype)
    torch.testing.assert_close(sum(parts), host_step(case, (pred, target))[0], rtol=tolerance, atol=0)


@every_case
def test_a_full_pass_is_the_hosts(case):
    batch = case.batch(torch.float32)
    value, gradient, _ = our_step(case, batch, torch.ones(BATCH), pruned=False)
    host_value, host_gradient = host_step(case, batch)
    torch.testing.assert_close(value, host_value, rtol=1e-6, atol=0)
    assert_close(gradient, host_gradient, 1e-6)
    if not case.vectorised:
        assert torch.equal(value, host_value) and torch.equal(gradient, host_gradient)


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_pruned_pass_shows_the_mean_by_weights_and_has_the_oracles_gradient(case, dtype):
    if dtype == torch.float64 and not case.double:
        dtype = torch.float32
    batch, weights = case.batch(dtype), make_weights()
    value, gradient, _ = our_step(case, batch, weights, pruned=True)
    assert float(value) == pytest.approx(oracle_value(case, batch, weights), rel=2e-6)
    assert_close(gradient, oracle_gradient(case, batch, weights), tolerance_of(case, dtype))
    assert not gradient[weights == 0].any()


@every_case
def test_the_form_follows_the_pass_and_not_the_weights(case):
    """A pruned pass has the samples' own losses even where all weights are one; a full pass has the host's."""
    dtype = torch.float64 if case.double else torch.float32
    batch, ones = case.batch(dtype), torch.ones(BATCH)
    host = host_step(case, batch)[1]
    pruned = our_step(case, batch, ones, pruned=True)[1]
    assert_close(pruned, oracle_gradient(case, batch, ones), tolerance_of(case, dtype))
    if case.parts is None:
        assert float((pruned - host).norm() / host.norm()) > 1e-3
    full = our_step(case, batch, ones, pruned=False)[1]
    assert_close(full, host, tolerance_of(case, dtype))


@every_case
def test_a_batch_of_one_is_weighed(case):
    pred, target = (each[:1] for each in case.batch(torch.float32))
    value, gradient, (scores, _) = our_step(case, (pred, target), torch.tensor([2.5]), pruned=True)
    host_value, host_gradient = host_step(case, (pred, target))
    torch.testing.assert_close(value, host_value, rtol=1e-6, atol=0)
    assert_close(gradient, 2.5 * host_gradient, 1e-5)
    assert scores.shape == (1,)


# ---------------------------------------------------------------- scores


def own_losses(case, batch):
    """What a sample is scored by: its own loss, a mean over valid pixels where the loss has one for each."""
    module, (pred, target) = case.module(), batch
    call = {key: value for key, value in case.call.items() if key != "avg_factor"}
    if case.loss["type"] != "FocalLoss":
        return torch.stack(losses_alone(module, BATCH, pred, target, **call)).detach()
    elementwise = module(pred, target, reduction_override="none", **call).detach()
    kept = target != 255 if target.shape != pred.shape else torch.ones(BATCH, *SIZE, dtype=torch.bool)
    return torch.stack([each[:, mask].mean() for each, mask in zip(elementwise, kept, strict=True)])


@every_case
@pytest.mark.parametrize("pruned", [False, True], ids=["full", "pruned"])
def test_scores_are_the_samples_own_losses(case, pruned):
    batch = case.batch(torch.float32)
    weights = make_weights() if pruned else torch.ones(BATCH)
    scores, valid = our_step(case, batch, weights, pruned)[2]
    assert scores.dtype == torch.float32 and scores.shape == (BATCH,) and not scores.requires_grad
    assert valid.dtype == torch.bool and valid.all()
    torch.testing.assert_close(scores, own_losses(case, batch), rtol=2e-6, atol=1e-7)


@parametrized(lambda case: labelled(case) and case.blank)
@pytest.mark.parametrize("pruned", [False, True], ids=["full", "pruned"])
def test_a_sample_without_a_valid_pixel_has_no_score(case, pruned):
    pred, target = case.batch(torch.float32, blank=2)
    if case.loss["type"] != "DiceLoss":  # whose ignore_index is a class
        target[2] = case.loss.get("ignore_index", 255)
    weights = make_weights() if pruned else torch.ones(BATCH)
    value, _, (scores, valid) = our_step(case, (pred, target), weights, pruned)
    expected = host_step(case, (pred, target))[0]
    if pruned:
        expected = oracle_value(case, (pred, target), weights, valid)
    assert float(value) == pytest.approx(float(expected), rel=2e-6)
    assert valid.tolist() == [True, True, False, True]
    assert torch.equal(scores[2], torch.tensor(0.0))
    kept = torch.tensor([0, 1, 3])
    torch.testing.assert_close(scores[kept], own_losses(case, (pred, target))[kept], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["silog", "silog_sum"])
def test_an_image_without_a_depth_has_no_score(name):
    case = CASES[name]
    module, weigher, _ = attached(case)
    pred, target = case.batch(torch.float32, blank=2)
    weigher.begin(torch.ones(BATCH), pruned=False)
    with torch.no_grad():  # the host's own gradient is NaN here
        module(pred, target)
    assert weigher.end()[1].tolist() == [True, True, False, True]


@pytest.mark.parametrize("pruned", [False, True], ids=["full", "pruned"])
@pytest.mark.parametrize("name", ["ohem_keeps_all", "ohem_threshold", "ohem_min_kept", "ohem_class_weight"])
def test_a_batch_without_a_valid_pixel_is_the_hosts_and_has_no_score(name, pruned):
    case = CASES[name]
    pred, target = case.batch(torch.float32)
    target = torch.full_like(target, 255)
    value, gradient, (_, valid) = our_step(case, (pred, target), make_weights(), pruned)
    assert torch.equal(value, host_step(case, (pred, target))[0])
    assert gradient is None
    assert not valid.any()


@every_case
def test_which_losses_are_evaluated_sample_by_sample(case):
    _, _, views = attached(case)
    assert views.vectorised == case.vectorised
    title = f"decode_head.loss_decode ({case.loss['type']} of FCNHead)"
    assert views.not_separable == ([title] if case.parts is None else [])


@every_case
def test_restored_losses_are_the_hosts(case):
    module, weigher, views = attached(case)
    views.restore()
    weigher.begin(make_weights())
    pred, target = case.batch(torch.float32)
    pred.grad = None
    loss = module(pred, target, **case.call).mean()
    loss.backward()
    value, gradient = host_step(case, (pred, target))
    assert torch.equal(loss.detach(), value) and torch.equal(pred.grad, gradient)
    assert weigher.end() == (None, None)
    assert set(vars(module)) == set(vars(copy.deepcopy(case.module())))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_divergence_keeps_the_shape_in_which_its_head_reduces_it(reduction):
    """``KLDivLoss`` gives one loss for each sample: the head that calls it may sum them, or scale each."""
    case = Case(dict(type="KLDivLoss", reduction=reduction), target=logits_target, **NO_OPTIONS)
    pred, target = case.batch(torch.float32)
    module, weigher, _ = attached(case)
    weigher.begin(torch.ones(BATCH), pruned=False)
    host = KLDivLoss(reduction=reduction)(pred, target)
    torch.testing.assert_close(module(pred, target).sum(), host.sum(), rtol=1e-6, atol=0)
