"""Small models of every kind that is weighed, and steps of them that are taken on one device or another."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")
import oracle_mmpretrain as cls
from mmpretrain.models.heads import LinearClsHead
from mmseg.models.decode_heads import FCNHead
from oracle import build as build_segmentor
from oracle import ce, encoder_decoder, fcn, make_inputs, make_labels, make_samples, make_weights
from oracle_losses import labels_of, tiny_model, with_head
from oracle_selfsup import DIMS, Model, Predictions

from infobatch_mm.core import Plan
from infobatch_mm.core.store import ScoreStore
from infobatch_mm.losses import HeadRule, LossWeigher, attach_views, register_head_rule

BATCH = 4
SIZE = (8, 8)
INDICES = torch.tensor([11, 5, 7, 3])
ALONE = BATCH + 1  # evaluations of a loss that is evaluated on each sample alone, and on the batch


# ---------------------------------------------------------------- models


class InlineHead(FCNHead):
    """A mean over the batch's valid pixels, that nobody registered: NaN for an image without one."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = labels_of(batch_data_samples)
        return dict(loss_inline=nn.functional.cross_entropy(seg_logits, labels, ignore_index=255))


class DecayedHead(FCNHead):
    """The same with a term on its own parameters."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        losses = InlineHead.loss_by_feat(self, seg_logits, batch_data_samples)
        return dict(**losses, loss_decay=0.1 * self.conv_seg.weight.pow(2).mean())


class CountedHead(InlineHead):
    """One that is told on the CPU which of its images have something to find, as detectors' are."""


VALID = torch.arange(BATCH) != 1
register_head_rule(CountedHead, HeadRule(trusted=True, valid=lambda head, arguments: VALID))


class MeanHead(LinearClsHead):
    """Computes its loss itself."""

    def loss(self, feats, data_samples, **kwargs):
        labels = torch.cat([sample.gt_label for sample in data_samples])
        return dict(loss=nn.functional.cross_entropy(self(feats), labels))


class Reconstruction(nn.Module):
    """A masked model's head that nobody registered: 0 / 0, also by its own parameter, for an image without a mask."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(DIMS))

    def loss(self, pred, target, mask):
        return ((pred * self.scale - target).abs().mean(-1) * mask).sum() / mask.sum()


def own_masked_head():
    return Predictions(Reconstruction(), masked_values(0)[0], (0,)).train()


def with_loss(**loss):
    def make():
        return tiny_model(fcn(0, 4, num_convs=0, channels=4, loss=loss))

    return make


def mixing(*augments):
    def make():
        preprocessor = dict(num_classes=cls.NUM_CLASSES, batch_augments=dict(augments=list(augments)))
        return cls.build(cls.classifier(cls.linear_head(), data_preprocessor=preprocessor))

    return make


def halves(images, scores):
    """A batch augmentation of a third party."""
    return (images + images.roll(1, 0)) / 2, (scores + scores.roll(1, 0)) / 2


def mixing_of_ones_own():
    model = cls.build(cls.classifier(cls.linear_head(), data_preprocessor=dict(num_classes=cls.NUM_CLASSES)))
    model.data_preprocessor.to_onehot, model.data_preprocessor.batch_augments = True, halves
    return model


def multi_task():
    heads = dict(shape=cls.linear_head(), colour=cls.linear_head(dict(type="LabelSmoothLoss", label_smooth_val=0.1)))
    return cls.build(cls.classifier(dict(type="MultiTaskHead", task_heads=heads)))


def mean_head():
    model = cls.build(cls.classifier(cls.linear_head()))
    model.head.__class__ = MeanHead
    return model


# ---------------------------------------------------------------- data and steps


def scenes(turn, batch=BATCH, size=SIZE):
    """Images and labels, one image without any."""
    labels = make_labels(batch, size, blank=1 if batch > 1 else None, seed=30 + turn)
    return make_inputs(batch, (32, 32), seed=20 + turn), make_samples(labels)


def whole_scenes(turn):
    return scenes(turn, size=(32, 32))


def one_scene(turn):
    return scenes(turn, batch=1)


def pictures(turn):
    return cls.make_inputs(seed=turn), cls.labelled(cls.make_labels(seed=turn))


def tasks(turn):
    both = [dict(zip(("shape", "colour"), cls.labelled([i, i]), strict=True)) for i in cls.make_labels(seed=turn)]
    del both[1]["shape"], both[2]["colour"]
    return cls.make_inputs(seed=turn), [cls.with_tasks(each) for each in both]


def masked_values(turn):
    mask = (torch.arange(6) < torch.tensor([3, 0, 2, 6])[:, None]).float()
    return [*(torch.randn(BATCH, 6, DIMS, generator=cls.generator(turn + i)) for i in range(2)), mask], None


def losses_of_values(model, values, samples):
    model.arguments = values  # the predictions are the model's own
    return model.loss()


def losses_of(model, inputs, samples):
    return model(inputs, samples, mode="loss")


def mixed_losses_of(model, inputs, samples):
    return model(**model.data_preprocessor(dict(inputs=inputs, data_samples=samples), True), mode="loss")


@dataclass
class Kind:
    """A model, its batches by turn, and how often the host's own losses are evaluated in a step of ours."""

    model: Callable[[], nn.Module]
    batch: Callable[[int], tuple]
    evaluations: int = 1
    losses: Callable = losses_of


def self_supervised(name):
    case = Model(name)
    return Kind(case.build, lambda turn: (case.inputs(BATCH), case.samples(BATCH)))


CRITERIA = dict(loss=[ce(), ce(avg_non_ignore=True, loss_weight=0.4), ce(use_sigmoid=True)])
KINDS = {
    "fcn": Kind(lambda: build_segmentor(encoder_decoder(fcn(), fcn(2, 16, loss=ce(loss_weight=0.4)))), whole_scenes),
    "fcn_avg_non_ignore": Kind(
        lambda: build_segmentor(encoder_decoder(fcn(**CRITERIA), fcn(2, 16, loss=ce(avg_non_ignore=True)))),
        whole_scenes,
    ),
    "class_weight": Kind(with_loss(**ce(class_weight=[0.5, 1.0, 2.5, 0.1, 1.7])), scenes),
    "dice": Kind(with_loss(type="DiceLoss"), scenes),
    "lovasz": Kind(with_loss(type="LovaszLoss", reduction="none"), scenes, ALONE),
    "tversky": Kind(with_loss(type="TverskyLoss"), scenes, ALONE),
    "inline": Kind(lambda: with_head(InlineHead), scenes, ALONE),
    "inline_batch_of_one": Kind(lambda: with_head(InlineHead), one_scene, 2),
    "decayed": Kind(lambda: with_head(DecayedHead), scenes, ALONE),
    "counted": Kind(lambda: with_head(CountedHead), scenes, ALONE),
    "masked_head": Kind(own_masked_head, masked_values, ALONE, losses_of_values),
    "classifier": Kind(lambda: cls.build(cls.classifier(cls.linear_head(cal_acc=True))), pictures),
    "mean_head": Kind(mean_head, pictures, ALONE),
    "mixup": Kind(mixing(dict(type="Mixup", alpha=0.8)), pictures, losses=mixed_losses_of),
    "cutmix": Kind(mixing(dict(type="CutMix", alpha=1.0)), pictures, losses=mixed_losses_of),
    "mixture_of_ones_own": Kind(mixing_of_ones_own, pictures, losses=mixed_losses_of),
    "multi_task": Kind(multi_task, tasks),
    **{name: self_supervised(name) for name in ("mae", "simmim", "mixmim", "beit_v1", "beit_v2")},
}


class Run:
    """Steps of one model, with its losses weighed or as the untouched host.

    Args:
        kind (Kind): The model and its batches.
        is_ours (bool): Whether its losses are weighed.
    """

    def __init__(self, kind, is_ours=True):
        self.kind = kind
        self.model = kind.model()
        self.weigher, self.store, self.is_ours = LossWeigher(), ScoreStore(12), is_ours
        if is_ours:
            attach_views(self.model, self.weigher)

    def step(self, batch, pruned):
        """Forward and backward pass of a batch; returns the loss, and scores and which of them are valid."""
        inputs, samples = batch
        size = BATCH if samples is None else len(samples)
        weights, indices = make_weights(size) if pruned else torch.ones(size), INDICES[:size]
        if self.is_ours:
            self.weigher.begin(weights, pruned, indices, Plan(indices, weights, pruned).pair_weights)
        self.model.zero_grad()
        loss, _ = self.model.parse_losses(self.kind.losses(self.model, inputs, samples))
        loss.backward()
        scores, valid = self.weigher.end()
        if scores is not None:
            self.store.record(indices, scores, valid)
        return loss.detach(), scores, valid
