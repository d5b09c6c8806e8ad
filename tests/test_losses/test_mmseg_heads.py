"""Heads with losses of their own, in whole tiny models: every parameter's gradient against the untouched host's."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
from mmseg.datasets.transforms import GenerateEdge
from mmseg.models.decode_heads import FCNHead, PIDHead
from oracle import (
    BN,
    NUM_CLASSES,
    assert_close_gradients,
    assert_close_whole_gradient,
    assert_same_tensors,
    ce,
    fcn,
    gradients,
    make_inputs,
    make_labels,
    make_weights,
    total,
)
from oracle_losses import (
    add_map,
    labels_of,
    losses_alone,
    make_full_samples,
    only,
    shares_of_ohem,
    shown,
    shown_by_own,
    shown_objective,
    tiny_model,
    weighted,
    weighted_mean,
    with_head,
)

from infobatch_mm.losses import LossWeigher, attach_views
from infobatch_mm.losses.model_views import ModelView, ParsedLossesView
from infobatch_mm.losses.views import OrderView

BATCH, SIZE = 4, (16, 16)


def head_of(name, **options):
    return dict(
        type=name, channels=4, num_classes=NUM_CLASSES, dropout_ratio=0, norm_cfg=BN, **{"loss_decode": ce(), **options}
    )


def kernel_update_head():
    return dict(
        type="KernelUpdateHead",
        num_classes=NUM_CLASSES,
        num_ffn_fcs=2,
        num_heads=1,
        num_mask_fcs=1,
        feedforward_channels=4,
        in_channels=4,
        out_channels=4,
        conv_kernel_size=1,
        kernel_updator_cfg=dict(
            type="mmseg.KernelUpdator", in_channels=4, feat_channels=4, out_channels=4, act_cfg=dict(type="ReLU")
        ),
    )


OHEM = dict(type="OhemCrossEntropy", thres=0.2, min_kept=40)
KNET = dict(
    type="IterativeDecodeHead",
    num_stages=2,
    kernel_update_head=[kernel_update_head(), kernel_update_head()],
    kernel_generate_head=fcn(0, 4, loss=ce(avg_non_ignore=False)),
)


# ---------------------------------------------------------------- heads of third parties


class InlineHead(FCNHead):
    """Computes its loss without a loss module, a mean over the batch's valid pixels."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = torch.stack([sample.gt_sem_seg.data[0] for sample in batch_data_samples])
        seg_logits = nn.functional.interpolate(seg_logits, labels.shape[1:], mode="bilinear")
        return dict(loss_inline=nn.functional.cross_entropy(seg_logits, labels, ignore_index=self.ignore_index))


class MaskedHead(FCNHead):
    """A mean over the batch's valid pixels, by a mask: 0 / 0 for an image without one."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = torch.stack([sample.gt_sem_seg.data[0] for sample in batch_data_samples])
        seg_logits = nn.functional.interpolate(seg_logits, labels.shape[1:], mode="bilinear")
        kept = labels != self.ignore_index
        pixels = nn.functional.cross_entropy(seg_logits, torch.where(kept, labels, 0), reduction="none")
        return dict(loss_masked=(pixels * kept).sum() / kept.sum())


class RegularisedHead(FCNHead):
    """Adds a term of its own to its parent's losses, which come from a loss module."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        losses = super().loss_by_feat(seg_logits, batch_data_samples)
        losses["loss_logits"] = 0.1 * seg_logits.pow(2).mean()
        losses["largest"] = seg_logits.max()
        return losses


class DecayedHead(FCNHead):
    """Adds a term on its own parameters to its parent's losses."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        losses = super().loss_by_feat(seg_logits, batch_data_samples)
        losses["loss_decay"] = 0.1 * self.conv_seg.weight.pow(2).sum()
        return losses


class DivergingHead(FCNHead):
    """Two predictions, one of which follows the other."""

    def forward(self, inputs):
        logits = super().forward(inputs)
        return [logits, logits.pow(2)]

    def loss_by_feat(self, seg_logits, batch_data_samples):
        student, teacher = seg_logits
        losses = super().loss_by_feat(student, batch_data_samples)
        losses["loss_divergence"] = self.loss_divergence(student, teacher.detach()).mean()
        return losses


# ---------------------------------------------------------------- what the samples contribute


def alone(head, outputs, samples):
    """The untouched head's loss on each sample's predictions alone."""
    return losses_alone(lambda *arguments: total(head.loss_by_feat(*arguments)), BATCH, outputs, samples)


def shares_alone(head, outputs, samples, weights):
    """Where the loss is a mean over samples, and where it does not separate."""
    return weighted_mean(alone(head, outputs, samples), weights)


def upsampled(logits):
    return nn.functional.interpolate(logits, SIZE, mode="bilinear", align_corners=False)


def ddr_objective(head, outputs, samples, weights):
    labels = labels_of(samples)
    parts = [
        shares_of_ohem(loss, upsampled(logits), labels) for loss, logits in zip(head.loss_decode, outputs, strict=True)
    ]
    return sum(weighted(each, weights) for each in parts)


def pid_objective(head, outputs, samples, weights):
    """Cross entropy, OHEM, boundaries, and OHEM at the pixels that look like boundaries."""
    labels, edges = labels_of(samples), labels_of(samples, "gt_edge_map")
    p, i, d = (upsampled(logits) for logits in outputs)
    ce_loss, ohem, boundary, ohem_at_boundary = head.loss_decode
    near = torch.where(d[:, 0].sigmoid() > 0.8, labels, 255)
    assert (near != 255).any()
    return (
        weighted_mean(losses_alone(ce_loss, BATCH, p, labels, ignore_index=255), weights)
        + weighted(shares_of_ohem(ohem, i, labels), weights)
        + weighted_mean(losses_alone(boundary, BATCH, d, edges), weights)
        + weighted(shares_of_ohem(ohem_at_boundary, i, near), weights)
    )


def make_depths(labels):
    depths = 0.5 + labels.clamp(max=NUM_CLASSES).double()
    depths[labels == 255] = 0
    return depths


def depth_samples(labels):
    return add_map(make_full_samples(labels), "gt_depth_map", make_depths(labels))


@dataclass
class Case:
    """A tiny model around a head, its oracle, and what is known of its views."""

    model: Callable
    objective: Callable = shares_alone
    samples: Callable = make_full_samples
    vectorised: bool = True
    not_separable: tuple = ()
    double: bool = True  # whether the host's losses keep float64
    modules: int = 1  # views, without the model's
    options: dict = field(default_factory=dict)


def pyramid(head, channels=(4,), strides=(4,), **options):
    return lambda dtype: tiny_model(head, channels, strides, dtype, **options)


def turned(head, loss=None, divergence=None):
    def make(dtype):
        model = with_head(head, dtype)
        if divergence is not None:
            from mmseg.registry import MODELS

            model.decode_head.loss_divergence = MODELS.build(divergence)
        return model

    return make


def pid_model(dtype):
    losses = [ce(), OHEM, dict(type="BoundaryLoss", loss_weight=2.0), OHEM]
    model = tiny_model(head_of("PIDHead", in_channels=16, loss_decode=losses), (8, 16, 8), (4, 4, 4), dtype)
    nn.init.constant_(model.decode_head.d_cls_seg.bias, 1.4)  # some pixels look like boundaries
    return model


DA_HEAD = head_of("DAHead", in_channels=8, in_index=0, pam_channels=4)
STDC_LOSSES = [ce(use_sigmoid=True), dict(type="DiceLoss", loss_name="loss_dice")]
STDC_HEAD = {
    **head_of("STDCHead", in_channels=4, in_index=0, num_convs=1, concat_input=False, loss_decode=STDC_LOSSES),
    **dict(num_classes=2, out_channels=1, threshold=0.5, boundary_threshold=0.1),
}
SEGMENTER = dict(in_channels=4, in_index=0, num_layers=1, num_heads=1, embed_dims=4, drop_path_rate=0.0)
VPD = dict(
    type="VPDDepthHead",
    in_channels=[16, 16, 16, 16],
    embed_dim=2,
    feature_dim=16,
    num_deconv_layers=1,
    num_deconv_filters=[4],
    loss_decode=dict(type="SiLogLoss"),
)

CASES = {
    "enc": Case(
        pyramid(head_of("EncHead", in_channels=[4, 8], in_index=[0, 1], num_codes=3), (4, 8), (4, 4)),
        double=False,
        modules=2,
    ),
    "ema": Case(pyramid(head_of("EMAHead", in_channels=4, in_index=0, ema_channels=4, num_bases=3, num_stages=2))),
    "da": Case(pyramid(DA_HEAD, (8,))),
    "stdc": Case(pyramid(STDC_HEAD), double=False, modules=2),
    "pid": Case(
        pid_model,
        pid_objective,
        vectorised=False,
        not_separable=("decode_head.loss_decode.2 (BoundaryLoss of PIDHead)",),
        modules=4,
    ),
    "ddr": Case(
        pyramid(head_of("DDRHead", in_channels=8, loss_decode=[OHEM, {**OHEM, "loss_weight": 0.4}]), (4, 8), (4, 4)),
        ddr_objective,
        vectorised=False,
        modules=2,
    ),
    "knet": Case(pyramid(KNET)),
    "segmenter": Case(pyramid({**head_of("SegmenterMaskTransformerHead", **SEGMENTER), "norm_cfg": dict(type="LN")})),
    "vpd_depth": Case(pyramid(VPD, (16, 16, 16, 16), (2, 4, 8, 16), type="DepthEstimator"), samples=depth_samples),
    "inline": Case(turned(InlineHead), vectorised=False, not_separable=("decode_head (InlineHead)",)),
    "masked": Case(turned(MaskedHead), vectorised=False, not_separable=("decode_head (MaskedHead)",)),
    "regularised": Case(turned(RegularisedHead), vectorised=False, not_separable=("decode_head (RegularisedHead)",)),
    "decayed": Case(turned(DecayedHead), vectorised=False, not_separable=("decode_head (DecayedHead)",)),
    "diverging": Case(
        turned(DivergingHead, divergence=dict(type="KLDivLoss")),
        vectorised=False,
        not_separable=("decode_head (DivergingHead)",),
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make_batch(case, dtype=torch.float64, blank=None):
    classes = 2 if case is CASES["stdc"] else NUM_CLASSES
    labels = make_labels(BATCH, SIZE, classes, blank=blank)
    return make_inputs(BATCH, (64, 64), dtype)[..., : 4 * SIZE[0], : 4 * SIZE[1]], case.samples(labels)


def twins(case, dtype=torch.float64):
    host = case.model(dtype)
    return host, copy.deepcopy(host)


def attached(model, weights, pruned):
    weigher = LossWeigher()
    views = attach_views(model, weigher)
    weigher.begin(weights, pruned=pruned)
    return weigher, views


def step(model, batch):
    losses = model.loss(*batch)
    total(losses).backward()
    return losses, gradients(model)


def oracle_step(case, host, batch, weights):
    """Gradients of the weighted objective, and the samples' own losses."""
    inputs, samples = batch
    outputs = host.decode_head(host.extract_feat(inputs))
    case.objective(host.decode_head, outputs, samples, weights).backward()
    return gradients(host), [float(each.detach()) for each in alone(host.decode_head, outputs, samples)]


def oracle_value(case, host, batch, weights):
    """What a pruned pass shows: each loss by its contributions, or by the samples' own losses."""
    host, (inputs, samples) = copy.deepcopy(host), batch
    outputs = host.decode_head(host.extract_feat(inputs))
    if case.not_separable == (f"decode_head ({type(host.decode_head).__name__})",):
        whole = host.decode_head.loss_by_feat(outputs, samples)
        each = [host.decode_head.loss_by_feat(*(only(value, i) for value in (outputs, samples))) for i in range(BATCH)]
        return sum(shown_by_own(whole[key], [own[key] for own in each], weights) for key in whole if "loss" in key)
    # The boundaries' loss of one image is the batch's where its two classes are as frequent: here it is not the mean.
    boundary = 0.0
    if isinstance(host.decode_head, PIDHead):
        loss, pred, edges = host.decode_head.loss_decode[2], upsampled(outputs[2]), labels_of(samples, "gt_edge_map")
        own = losses_alone(loss, BATCH, pred, edges)
        boundary = shown_by_own(loss(pred, edges), own, weights) - shown([each / BATCH for each in own], weights)
    objective = case.objective(host.decode_head, outputs, samples, weights).detach()
    return shown_objective(objective, weights) + float(boundary)


# ---------------------------------------------------------------- values and gradients


@every_case
def test_a_full_pass_is_the_hosts(case):
    host, model = twins(case, torch.float32)
    batch = make_batch(case, torch.float32)
    weigher, _ = attached(model, torch.ones(BATCH), pruned=False)
    ours, theirs = step(model, batch), step(host, batch)
    assert list(ours[0]) == list(theirs[0])
    for key, value in theirs[0].items():
        torch.testing.assert_close(ours[0][key], value, rtol=1e-6, atol=0)
    assert_close_whole_gradient(ours[1], theirs[1], 1e-6)
    assert weigher.end()[0] is not None, "computed around our path"


@every_case
def test_a_pruned_pass_shows_the_mean_by_weights_and_has_the_oracles_gradient(case):
    host, model = twins(case)
    batch, weights = make_batch(case), make_weights()
    attached(model, weights, pruned=True)
    losses, ours = step(model, batch)
    assert float(total(losses).detach()) == pytest.approx(oracle_value(case, host, batch, weights), rel=2e-6)
    assert_close_gradients(ours, oracle_step(case, host, batch, weights)[0], 1e-6 if case.double else 1e-5)


@every_case
def test_a_pruned_pass_in_float32_has_the_oracles_gradient(case):
    host, model = twins(case, torch.float32)
    batch, weights = make_batch(case, torch.float32), make_weights()
    attached(model, weights, pruned=True)
    _, ours = step(model, batch)
    assert_close_whole_gradient(ours, oracle_step(case, host, batch, weights)[0], 1e-5)


@every_case
def test_the_form_follows_the_pass_and_not_the_weights(case):
    host, model = twins(case)
    batch, ones = make_batch(case), torch.ones(BATCH)
    attached(model, ones, pruned=True)
    _, ours = step(model, batch)
    assert_close_gradients(ours, oracle_step(case, host, batch, ones)[0], 1e-6 if case.double else 1e-5)


@every_case
def test_a_batch_of_weight_zero_trains_nothing(case):
    _, model = twins(case)
    attached(model, torch.zeros(BATCH), pruned=True)
    _, ours = step(model, make_batch(case))
    assert all(not gradient.any() for gradient in ours.values() if gradient is not None)


# ---------------------------------------------------------------- scores


def scored_losses(head, outputs, samples):
    """Losses of samples alone, each cross entropy as a mean over the valid pixels."""
    for module in head.modules():
        if hasattr(module, "avg_non_ignore"):
            module.avg_non_ignore = True
    return [float(each.detach()) for each in alone(head, outputs, samples)]


@every_case
@pytest.mark.parametrize("pruned", [False, True], ids=["full", "pruned"])
def test_scores_are_the_samples_own_losses(case, pruned):
    host, model = twins(case)
    batch = make_batch(case)
    weigher, _ = attached(model, make_weights() if pruned else torch.ones(BATCH), pruned)
    model.loss(*batch)
    scores, valid = weigher.end()
    outputs = host.decode_head(host.extract_feat(batch[0]))
    by_modules = case.not_separable != (f"decode_head ({type(host.decode_head).__name__})",)
    score_of = scored_losses if by_modules else lambda *given: [float(each.detach()) for each in alone(*given)]
    assert scores.tolist() == pytest.approx(score_of(host.decode_head, outputs, batch[1]), rel=1e-5)
    assert valid.all()


@pytest.mark.parametrize("pruned", [False, True], ids=["full", "pruned"])
@pytest.mark.parametrize("name", sorted(set(CASES) - {"vpd_depth"}))
def test_a_sample_without_a_valid_pixel_has_no_score(name, pruned):
    """Even where some of its terms do not look at labels, or have targets without an ignored value."""
    case = CASES[name]
    weigher, _ = attached(model := case.model(torch.float64), torch.ones(BATCH), pruned)
    inputs, samples = make_batch(case, blank=2)
    for sample in samples:
        labels = sample.gt_sem_seg.data[0].numpy()
        results = GenerateEdge(edge_width=2)(dict(img_shape=labels.shape, gt_seg_map=labels))
        add_map([sample], "gt_edge_map", torch.from_numpy(results["gt_edge_map"])[None].long())
    assert not samples[2].gt_edge_map.data.any() and samples[0].gt_edge_map.data.any()
    model.loss(inputs, samples)
    scores, valid = weigher.end()
    assert valid.tolist() == [True, True, False, True]
    assert scores[valid].isfinite().all()


@pytest.mark.parametrize("pruned", [False, True], ids=["full", "pruned"])
@pytest.mark.parametrize("name", ["inline", "masked", "regularised", "diverging", "ema", "pid", "ddr"])
def test_a_sample_without_a_valid_pixel_spoils_no_gradient(name, pruned):
    """The host's loss on it alone may be NaN (a mean of no pixels); its loss on the batch is not."""
    case = CASES[name]
    host, model = twins(case)
    batch = make_batch(case, blank=2)
    attached(model, make_weights() if pruned else torch.ones(BATCH), pruned)
    ours, theirs = step(model, batch), step(host, batch)
    if not pruned:
        torch.testing.assert_close(total(ours[0]), total(theirs[0]), rtol=1e-6, atol=0)
    assert total(ours[0]).isfinite() and total(theirs[0]).isfinite()
    assert all(gradient is None or gradient.isfinite().all() for gradient in theirs[1].values())
    assert all(gradient is None or gradient.isfinite().all() for gradient in ours[1].values())


# ---------------------------------------------------------------- views


@every_case
def test_which_heads_are_evaluated_sample_by_sample(case):
    _, views = attached(case.model(torch.float32), torch.ones(BATCH), pruned=False)
    assert views.vectorised == case.vectorised
    assert views.not_separable == list(case.not_separable)
    assert sum(not isinstance(view, (OrderView, ModelView, ParsedLossesView)) for view in views._views) == case.modules


@every_case
def test_outside_a_batch_and_after_restore_the_model_is_the_hosts(case):
    host, model = twins(case, torch.float32)
    before = [dict(vars(module)) for module in model.modules()]
    batch = make_batch(case, torch.float32)
    weigher, views = attached(model, torch.ones(BATCH), pruned=False)
    weigher.end()
    for give_back in (lambda: None, views.restore):
        give_back()
        ours, theirs = step(model, batch), step(host, batch)
        assert_same_tensors(ours[0], theirs[0])
        assert_same_tensors(ours[1], theirs[1])
    assert weigher.end() == (None, None)
    for module, old in zip(model.modules(), before, strict=True):
        assert list(vars(module)) == list(old)


@every_case
def test_buffers_are_as_the_host_leaves_them(case):
    """Running means are taken in once for each step, however often losses are evaluated."""
    host, model = twins(case, torch.float32)
    batch = make_batch(case, torch.float32)
    attached(model, make_weights(), pruned=True)
    step(model, batch), step(host, batch)
    assert_same_tensors(dict(model.named_buffers()), dict(host.named_buffers()))


def test_the_oracle_takes_outputs_apart():
    outputs = [torch.arange(4.0)[:, None], torch.arange(4.0)[:, None] * 2]
    assert [only(outputs, 3)[k].tolist() for k in range(2)] == [[[3.0]], [[6.0]]]
