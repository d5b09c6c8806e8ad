"""Every classification loss of mmpretrain, weighed, against the untouched host on one sample at a time."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("mmpretrain")
from mmpretrain.models import losses as host_losses
from mmpretrain.registry import MODELS
from oracle_losses import only, passes, shown, weighted
from oracle_mmpretrain import (
    BATCH,
    NUM_CLASSES,
    ONES,
    WEIGHTS,
    build,
    classifier,
    generator,
    linear_head,
    make_scores,
    make_sets,
)

from infobatch_mm.losses import LossWeigher, attach_views

CLASS_WEIGHT = [0.5, 1.0, 2.5, 0.1, 1.7]


def labels():
    return torch.tensor([3, 0, 4, 2])


def ignored_labels():
    return torch.tensor([3, 0, -100, 2])


def columns():
    """Labels as the host's losses take them as well: shape ``(B, 1)``."""
    return labels()[:, None]


def sets():
    target = torch.zeros(BATCH, NUM_CLASSES)
    for row, classes in zip(target, make_sets(), strict=True):
        row[classes] = 1
    return target


def soft():
    return make_scores()


def values():
    return torch.randn(BATCH, NUM_CLASSES, generator=generator(8))


def single_values():
    return values()[:, 0]


@dataclass
class Case:
    """A loss, a batch of targets for it, and what the host divides its sum by."""

    loss: dict
    target: Callable = labels
    avg_factor: bool = True  # whether its caller gives one, as all heads do and timm's classifier does not
    score: Callable | None = None  # of targets: which samples have one

    def batch(self, dtype=torch.float64):
        pred = 2 * torch.randn(BATCH, NUM_CLASSES, generator=generator(7))
        target = self.target()
        if target.dim() == 1 and target.is_floating_point():
            pred = pred[:, 0]
        return pred.to(dtype), target.to(dtype) if target.is_floating_point() else target

    def call(self, size=BATCH):
        return dict(avg_factor=size) if self.avg_factor else {}

    def module(self):
        return MODELS.build(copy.deepcopy(self.loss))

    def divisor(self):
        """What the host's loss of one sample alone is divided by to be its part in the batch's."""
        return 1 if self.loss.get("reduction") == "sum" else BATCH

    def alone(self, pred, target):
        """The untouched host's loss on each sample alone."""
        module = self.module()
        return [module(only(pred, i), only(target, i), **self.call(1)) for i in range(BATCH)]


def ce(**options):
    return dict(type="CrossEntropyLoss", **options)


def smooth(label_smooth_val=0.1, **options):
    return dict(type="LabelSmoothLoss", label_smooth_val=label_smooth_val, **options)


def focal(**options):
    return dict(type="FocalLoss", **options)


def asymmetric(**options):
    return dict(type="AsymmetricLoss", **options)


def regression(loss_type, **options):
    return dict(type="RegressionLoss", loss_type=loss_type, **options)


CASES = {
    "ce": Case(ce()),
    "ce_loss_weight": Case(ce(loss_weight=0.3)),
    "ce_class_weight": Case(ce(class_weight=CLASS_WEIGHT, loss_weight=1.9)),
    "ce_ignored_label": Case(ce(loss_weight=0.7), ignored_labels, score=lambda target: target != -100),
    "ce_soft_target": Case(ce(), soft),
    "ce_soft_target_class_weight": Case(ce(class_weight=CLASS_WEIGHT), soft),
    "ce_use_soft": Case(ce(use_soft=True, loss_weight=0.7), soft),
    "ce_use_soft_class_weight": Case(ce(use_soft=True, class_weight=CLASS_WEIGHT), soft),
    "ce_sigmoid": Case(ce(use_sigmoid=True), sets),
    "ce_sigmoid_soft": Case(ce(use_sigmoid=True, loss_weight=0.7), soft),
    "ce_sigmoid_weights": Case(
        ce(use_sigmoid=True, class_weight=CLASS_WEIGHT, pos_weight=[2.0, 0.5, 1.0, 3.0, 0.1]), sets
    ),
    "ce_mean": Case(ce(loss_weight=0.7), avg_factor=False),
    "ce_mean_ignored_label": Case(ce(), ignored_labels, avg_factor=False, score=lambda target: target != -100),
    "ce_sum": Case(ce(reduction="sum", loss_weight=0.7), avg_factor=False),
    "ce_soft_mean": Case(ce(), soft, avg_factor=False),
    "ce_sigmoid_mean": Case(ce(use_sigmoid=True, loss_weight=0.7), sets, avg_factor=False),
    "ce_sigmoid_sum": Case(ce(use_sigmoid=True, reduction="sum"), sets, avg_factor=False),
    "smooth": Case(smooth()),
    "smooth_known_classes": Case(smooth(num_classes=NUM_CLASSES, loss_weight=0.3)),
    "smooth_columns": Case(smooth(), columns),
    "smooth_soft": Case(smooth(), soft),
    "smooth_class_weight": Case(smooth(class_weight=CLASS_WEIGHT)),
    "smooth_sigmoid": Case(smooth(use_sigmoid=True)),
    "smooth_classy_vision": Case(smooth(mode="classy_vision")),
    "smooth_classy_vision_soft": Case(smooth(mode="classy_vision"), soft),
    "smooth_multi_label": Case(smooth(mode="multi_label", use_sigmoid=True), sets),
    "smooth_multi_label_hard": Case(smooth(mode="multi_label"), labels),
    "smooth_multi_label_soft": Case(smooth(mode="multi_label", pos_weight=CLASS_WEIGHT), soft),
    "smooth_mean": Case(smooth(loss_weight=0.7), avg_factor=False),
    "smooth_sum": Case(smooth(reduction="sum"), avg_factor=False),
    "focal": Case(focal()),
    "focal_sets": Case(focal(gamma=1.5, alpha=0.6), sets),
    "focal_soft": Case(focal(loss_weight=0.3), soft),
    "focal_columns": Case(focal(), columns),
    "focal_mean": Case(focal(loss_weight=0.3), sets, avg_factor=False),
    "focal_sum": Case(focal(reduction="sum"), sets, avg_factor=False),
    "asymmetric": Case(asymmetric(), sets),
    "asymmetric_hard": Case(asymmetric(loss_weight=0.3)),
    "asymmetric_softmax": Case(asymmetric(use_sigmoid=False, gamma_pos=1.0, gamma_neg=2.0, clip=0.0), soft),
    "asymmetric_mean": Case(asymmetric(clip=0.2), sets, avg_factor=False),
    "asymmetric_sum": Case(asymmetric(reduction="sum", loss_weight=0.3), sets, avg_factor=False),
    "l1": Case(regression("L1Loss"), values),
    "l2": Case(regression("L2Loss", loss_weight=0.3), values),
    "mse_of_one_value": Case(regression("MSELoss"), single_values),
    "l1_mean": Case(regression("L1Loss", loss_weight=0.3), values, avg_factor=False),
    "l1_sum": Case(regression("L1Loss", reduction="sum"), values, avg_factor=False),
}
if not hasattr(host_losses, "RegressionLoss"):  # the fork has it, upstream has not
    CASES = {name: case for name, case in CASES.items() if case.loss["type"] != "RegressionLoss"}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def attached(case, loss=None):
    """A model with the loss, its loss module, and the weigher of its views."""
    model, weigher = build(classifier(linear_head())), LossWeigher()
    model.head.loss_module = case.module() if loss is None else loss
    views = attach_views(model, weigher)
    return model.head.loss_module, weigher, views


def step(module, batch, call):
    """Value and gradient, as they would be optimised."""
    pred = batch[0].clone().requires_grad_()
    loss = module(pred, batch[1], **call)
    loss.backward()
    return loss.detach(), pred.grad


def our_step(case, batch, weights, pruned):
    module, weigher, _ = attached(case)
    weigher.begin(weights, pruned=pruned)
    return *step(module, batch, case.call()), weigher.end()


def host_step(case, batch):
    return step(case.module(), batch, case.call())


def error(actual, expected):
    assert float(expected.norm()) > 0
    return float((actual - expected).norm() / expected.norm())


def test_every_loss_of_the_hosts_classifiers_is_here():
    tested = {case.loss["type"] for case in CASES.values()} | {"SeesawLoss"}
    # Losses of self-supervised methods and of their parts.
    others = {
        "CAELoss",
        "CosineSimilarityLoss",
        "CrossCorrelationLoss",
        "PixelReconstructionLoss",
        "SwAVLoss",
    }
    shipped = {name for name in host_losses.__all__ if name.endswith("Loss")}
    assert shipped == tested | others


# ---------------------------------------------------------------- values and gradients


@every_case
def test_contributions_of_the_reference_add_up_to_the_hosts_loss(case):
    batch = case.batch()
    whole = sum(case.alone(*batch)) / case.divisor()
    torch.testing.assert_close(whole, host_step(case, batch)[0], rtol=1e-6, atol=0)


@passes
@every_case
def test_weights_of_one_are_the_hosts_step(case, pruned):
    batch = case.batch(torch.float32)
    value, gradient, (scores, _) = our_step(case, batch, ONES, pruned)
    host_value, host_gradient = host_step(case, batch)
    assert torch.equal(value, host_value) and value.dtype == host_value.dtype
    assert error(gradient, host_gradient) <= 1e-6
    assert scores is not None, "computed around our path"


@passes
@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_weighted_sum_is_optimised_and_a_pruned_pass_shows_the_mean_by_weights(case, dtype, pruned):
    batch = case.batch(dtype)
    value, gradient, _ = our_step(case, batch, WEIGHTS, pruned)
    if pruned:
        parts = [each / case.divisor() for each in case.alone(*batch)]
        assert float(value) == pytest.approx(shown(parts, WEIGHTS), rel=2e-6)
    else:
        assert torch.equal(value, host_step(case, batch)[0])
    pred = batch[0].clone().requires_grad_()
    (weighted(case.alone(pred, batch[1]), WEIGHTS) / case.divisor()).backward()
    assert error(gradient, pred.grad) <= (1e-12 if dtype == torch.float64 else 1e-6)
    assert not gradient[WEIGHTS == 0].any()


@every_case
def test_a_batch_of_one_is_weighed(case):
    pred, target = (only(each, 0) for each in case.batch(torch.float32))
    module, weigher, _ = attached(case)
    weigher.begin(torch.tensor([2.5]))
    value, gradient = step(module, (pred, target), case.call(1))
    host_value, host_gradient = step(case.module(), (pred, target), case.call(1))
    assert torch.equal(value, host_value)
    assert error(gradient, 2.5 * host_gradient) <= 1e-6
    assert float(weigher.end()[0]) == pytest.approx(float(host_value), rel=1e-6)


@passes
@every_case
def test_scores_are_the_hosts_losses_of_samples_alone(case, pruned):
    batch = case.batch(torch.float32)
    scores, valid = our_step(case, batch, WEIGHTS, pruned)[2]
    assert scores.dtype == torch.float32 and not scores.requires_grad and valid.dtype == torch.bool
    kept = torch.ones(BATCH, dtype=torch.bool) if case.score is None else case.score(batch[1])
    assert valid.tolist() == kept.tolist()
    expected = torch.stack(case.alone(*batch)).detach()
    torch.testing.assert_close(scores[kept], expected[kept], rtol=2e-6, atol=1e-7)


@every_case
def test_losses_come_from_one_evaluation_and_are_given_back(case):
    module, weigher, views = attached(case, loss := case.module())
    assert views.vectorised and not views.not_separable
    views.restore()
    weigher.begin(WEIGHTS)
    batch = case.batch(torch.float32)
    for ours, theirs in zip(step(module, batch, case.call()), host_step(case, batch), strict=True):
        assert torch.equal(ours, theirs)
    assert weigher.end() == (None, None)
    for ours, theirs in zip(loss.modules(), case.module().modules(), strict=True):
        assert list(vars(ours)) == list(vars(theirs))


@every_case
def test_a_loss_that_gives_no_scalar_is_refused_by_name(case):
    loss = MODELS.build(dict(case.loss, reduction="none"))
    message = rf"head\.loss_module \({case.loss['type']} of LinearClsHead\) has reduction='none'.*use reduction='mean'"
    with pytest.raises(ValueError, match=message):
        attached(case, loss)


#: One loss of each kind of view.
KINDS = ["ce", "ce_sigmoid", "smooth", "focal", "asymmetric", "l1", "seesaw"]


@pytest.mark.parametrize("name", [name for name in KINDS if name in CASES or name == "seesaw"])
def test_a_call_for_elements_is_the_hosts(name):
    case = CASES.get(name) or Case(SEESAW)
    pred, target = case.batch(torch.float32)
    module, weigher, _ = attached(case)
    weigher.begin(WEIGHTS)
    elements = module(pred, target, reduction_override="none")
    assert torch.equal(elements, case.module()(pred, target, reduction_override="none"))
    assert weigher.end() == (None, None)


@pytest.mark.parametrize("name", [name for name in KINDS if name in CASES])
@pytest.mark.parametrize("weigh", [True, False], ids=["weighed", "idle"])
def test_sample_weights_of_a_caller_are_kept(name, weigh):
    """A head of one's own may weigh its samples itself: the contributions are the host's then too."""
    case, own = CASES[name], torch.tensor([0.5, 2.0, 1.0, 3.0])
    if name == "l1":  # whose weights are those of elements
        own = own[:, None].expand(-1, NUM_CLASSES)
    batch = case.batch(torch.float32)
    module, weigher, _ = attached(case)
    if weigh:
        weigher.begin(WEIGHTS, pruned=False)
    value, gradient = step(module, batch, case.call() | dict(weight=own))
    assert torch.equal(value, step(case.module(), batch, case.call() | dict(weight=own))[0])
    pred, host = batch[0].clone().requires_grad_(), case.module()
    parts = [host(only(pred, i), only(batch[1], i), weight=only(own, i), avg_factor=BATCH) for i in range(BATCH)]
    weighted(parts, WEIGHTS if weigh else ONES).backward()
    assert error(gradient, pred.grad) <= 1e-6


# ---------------------------------------------------------------- seesaw: a loss with a memory

SEESAW = dict(type="SeesawLoss", num_classes=NUM_CLASSES, loss_weight=0.7)


def seesaw_by_hand(pred, target, seen, p=0.8, q=2.0, eps=1e-2, loss_weight=0.7):
    """The loss of each sample (Wang et al., CVPR 2021, eq. 5-8), by loops, with the counts of classes held."""
    losses = []
    for logits, label in zip(pred, target.tolist(), strict=True):
        probabilities = logits.detach().softmax(0)
        denominator = 0.0
        for j in range(NUM_CLASSES):
            factor = 1.0
            if j != label:
                mitigation = min(1.0, (max(seen[j], 1) / max(seen[label], 1)) ** p)
                ratio = float(probabilities[j] / probabilities[label].clamp(min=eps))
                factor = mitigation * max(1.0, ratio) ** q
            denominator = denominator + factor * logits[j].exp()
        losses.append(loss_weight * (denominator.log() - logits[label]))
    return losses


@passes
@pytest.mark.parametrize("options", [{}, dict(p=0.0), dict(q=0.0), dict(p=1.5, q=0.7)], ids=str)
def test_seesaw_is_weighed_with_the_hosts_counts(options, pruned):
    case, host = Case(SEESAW | options), MODELS.build(SEESAW | options)
    module, weigher, _ = attached(case)
    seen = [0] * NUM_CLASSES
    for i in range(3):
        pred = torch.randn(BATCH, NUM_CLASSES, generator=generator(i), dtype=torch.float64)
        target = torch.randint(0, NUM_CLASSES - 1, (BATCH,), generator=generator(9 + i))
        for label in target.tolist():
            seen[label] += 1
        weigher.begin(WEIGHTS, pruned=pruned)
        value, gradient = step(module, (pred, target), case.call())
        scores, _ = weigher.end()
        whole = step(host, (pred, target), case.call())[0]
        pred.requires_grad_()
        own = seesaw_by_hand(pred, target, seen, **options)
        assert float(value) == pytest.approx(shown(own, WEIGHTS) / BATCH if pruned else float(whole), rel=1e-6)
        (weighted(own, WEIGHTS) / BATCH).backward()
        assert error(gradient, pred.grad) <= 1e-7  # the host's factors are in single precision
        torch.testing.assert_close(scores, torch.stack(own).detach().float(), rtol=1e-6, atol=1e-7)
        assert torch.equal(module.cum_samples, host.cum_samples) and module.cum_samples.tolist() == seen


@passes
def test_seesaw_with_weights_of_one_is_the_hosts_over_several_steps(pruned):
    case, host = Case(SEESAW), MODELS.build(SEESAW)
    module, weigher, _ = attached(case)
    for i in range(3):
        batch = torch.randn(BATCH, NUM_CLASSES, generator=generator(i)), labels() - (labels() > i).long()
        weigher.begin(ONES, pruned=pruned)
        ours, theirs = step(module, batch, case.call()), step(host, batch, case.call())
        assert torch.equal(ours[0], theirs[0]) and error(ours[1], theirs[1]) <= 1e-6
        assert weigher.end()[0] is not None
    assert torch.equal(module.cum_samples, host.cum_samples) and host.cum_samples.sum() == 3 * BATCH
