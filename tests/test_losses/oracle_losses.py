"""Reference for losses of every kind: the untouched host, called with one sample at a time.

Nothing here imports infobatch_mm. Where the host's loss is a mean over samples, what sample i contributes is the host's
loss on it alone, divided by the number of samples; tests check that these add up to the host's loss. OHEM is written
out pixel by pixel.
"""

import math

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.structures import PixelData
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS
from oracle import EPS, build, encoder_decoder, fcn, make_samples
from torch import nn


@MODELS.register_module(force=True)
class Pyramid(BaseModule):
    """A backbone of one convolution for each map, without anything that couples samples."""

    def __init__(self, channels=(4,), strides=(4,)):
        super().__init__()
        self.maps = nn.ModuleList(
            nn.Conv2d(3, width, stride, stride) for width, stride in zip(channels, strides, strict=True)
        )

    def forward(self, inputs):
        return tuple(each(inputs) for each in self.maps)


def tiny_model(head=None, channels=(4,), strides=(4,), dtype=torch.float32, **options):
    """An encoder-decoder on a pyramid; by default with a head of one convolution and no normalisation."""
    if head is None:
        head = fcn(0, channels[0], num_convs=0, channels=channels[0])
    return build(
        encoder_decoder(head, backbone=dict(type="Pyramid", channels=channels, strides=strides), **options), dtype
    )


def with_head(head, dtype=torch.float32, **attributes):
    """The tiny model, its head of one convolution turned into one of this class."""
    model = tiny_model(dtype=dtype)
    model.decode_head.__class__ = head
    for name, value in attributes.items():
        setattr(model.decode_head, name, value)
    return model


def with_loss(**loss):
    """A maker of the tiny model, whose head has this loss."""

    def make():
        model = with_head(FCNHead)
        model.decode_head.loss_decode = MODELS.build(loss)
        return model

    return make


#: Both kinds of pass.
passes = pytest.mark.parametrize("pruned", [False, True], ids=["full", "pruned"])


def labels_of(samples, name="gt_sem_seg"):
    """The samples' ground truth of this name, shape ``(N, H, W)``."""
    return torch.stack([getattr(sample, name).data[0] for sample in samples])


def add_map(samples, name, values):
    """Give each sample its map of values, shape ``(N, H, W)``, as one more ground truth."""
    for sample, value in zip(samples, values, strict=True):
        sample.set_data({name: PixelData(data=value[None].clone())})
    return samples


def make_edges(labels):
    """Edge maps of 0 and 1, a share of each."""
    return (labels % 3 == 0).long()


def make_full_samples(labels):
    """Samples with labels and with edges."""
    return add_map(make_samples(labels), "gt_edge_map", make_edges(labels))


# ---------------------------------------------------------------- one sample at a time


def only(value, i):
    """The part of sample ``i`` as a batch of one: of a tensor, of lists of them, or of a list of data samples."""
    if isinstance(value, torch.Tensor) or not isinstance(value[0], torch.Tensor):
        return value[i : i + 1]
    return type(value)([each[i : i + 1] for each in value])


def losses_alone(loss, batch, *arguments, **options):
    """The host's loss on each sample alone; one number each, whatever shape the host gives it."""
    return [loss(*(only(each, i) for each in arguments), **options).mean() for i in range(batch)]


def shares_of_mean(loss, pred, target, **options):
    """Contributions to a loss that is the mean over samples of equal size."""
    return [each / len(pred) for each in losses_alone(loss, len(pred), pred, target, **options)]


def shares_of_sum(loss, pred, target, **options):
    """Contributions to a loss that is summed over samples."""
    return losses_alone(loss, len(pred), pred, target, **options)


def shares_of_avg_factor(loss, pred, target, avg_factor, **options):
    """Contributions to a sum over elements that is divided by a factor."""
    return [
        each * pred[0].numel() / (avg_factor + EPS) for each in losses_alone(loss, len(pred), pred, target, **options)
    ]


def shares_of_ohem(module, pred, target):
    """Contributions to the host's ``OhemCrossEntropy``, by loops; the kept pixels and their number are held."""
    pixels = []
    for i, y, x in torch.cartesian_prod(*(torch.arange(size) for size in target.shape)).tolist():
        label = int(target[i, y, x])
        if label != module.ignore_label:
            loss = torch.logsumexp(pred[i, :, y, x], 0) - pred[i, label, y, x]
            pixels.append((math.exp(-float(loss.detach())), i, label, loss))
    parts = [0.0 * pred[i].sum() for i in range(len(pred))]
    if not pixels:
        return parts
    confidences = sorted(confidence for confidence, *_ in pixels)
    threshold = max(confidences[min(module.min_kept, len(pixels) - 1)], module.thresh)
    kept = [pixel for pixel in pixels if pixel[0] < threshold]
    for _, i, label, loss in kept:
        weight = 1.0 if module.class_weight is None else module.class_weight[label]
        parts[i] = parts[i] + module.loss_weight * weight * loss / len(kept)
    return parts


def weighted(parts, weights):
    return sum(weight * part for weight, part in zip(weights.double().tolist(), parts, strict=True))


def weighted_mean(losses, weights):
    return weighted(losses, weights) / len(losses)


# ---------------------------------------------------------------- what a pruned pass shows


def shown(parts, weights):
    """For contributions to a loss: their mean by weights, times their number; their sum where all weights are equal."""
    parts, weights = [float(each.detach()) for each in parts], weights.double().tolist()
    if len(set(weights)) == 1:
        return sum(parts)
    return len(parts) * sum(w * part for w, part in zip(weights, parts, strict=True)) / sum(weights)


def shown_by_own(value, own, weights):
    """For a loss that does not separate: the host's, times the own ones' mean by weights, by their plain mean."""
    return float(value.detach()) * shown(own, weights) / sum(float(each.detach()) for each in own)


def shown_objective(objective, weights):
    """For the weighted sum of contributions to a loss."""
    return float(objective) * len(weights) / float(weights.double().sum())
