"""MMSegmentation's losses: how each is taken apart by sample.

Normalisers are the host's and never see a weight.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from mmseg.models.losses import (
    BoundaryLoss,
    CrossEntropyLoss,
    DiceLoss,
    FocalLoss,
    HuasdorffDisstanceLoss,
    LovaszLoss,
    OhemCrossEntropy,
    SiLogLoss,
    TverskyLoss,
)
from mmseg.models.losses.cross_entropy_loss import binary_cross_entropy, cross_entropy
from mmseg.models.losses.kldiv_loss import KLDivLoss
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.devices import moved
from ..elements import samplewise_sum, valid_per_sample
from ..inseparable import InseparableView
from ..refusals import check_reduction
from ..registry import register_loss_factory, view_factory
from ..separable import SeparableView, SharesView
from ..view import LossView
from ..views import RowwiseView, SampleLosses, VectorisedView
from ..weigher import LossWeigher

_EPS = torch.finfo(torch.float32).eps  # what the host adds to its normalisers


def has_valid_pixel(module: nn.Module, arguments: dict) -> Tensor | None:
    """Which samples have a label that this loss does not ignore; the labels are its second argument."""
    label = [*arguments.values(), None][1]
    if not isinstance(label, Tensor) or label.is_floating_point():
        return None
    # A loss with an ignored label of its own is not given the head's.
    ignore_index = getattr(module, "ignore_label", getattr(module, "ignore_index", None))
    if ignore_index is None:
        ignore_index = arguments.get("kwargs", arguments).get("ignore_index", 255)
    return valid_per_sample(label != ignore_index) > 0


def _given_normaliser(reduction: str, avg_factor: float | None) -> float | None:
    """What a host's caller has a loss divided by; None where the loss counts for itself."""
    if reduction == "sum":
        return 1.0
    return None if avg_factor is None else avg_factor + _EPS


# ---- cross entropy ----------------------------------------------------------------------------------


@register_loss_factory(CrossEntropyLoss, replace=False)
def _cross_entropy_view(module: nn.Module, weigher: LossWeigher, scored: bool, title: str) -> LossView:
    check_reduction(module, title)
    criterion = module.cls_criterion
    if criterion not in (cross_entropy, binary_cross_entropy) and not isinstance(criterion, LossView):
        return InseparableView(module, weigher, scored, title, valid=has_valid_pixel)
    # One below forward, where the host's value can be had by the host's own operations.
    return VectorisedView(
        module, weigher, scored, title, _cross_entropy, "cls_criterion", scaled_by=module, trusted=True
    )


def _cross_entropy(
    module: nn.Module,
    pred: Tensor,
    label: Tensor,
    weight: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: float | None = None,
    ignore_index: int = -100,
    avg_non_ignore: bool = False,
    **kwargs: Any,
) -> SampleLosses:
    binary = module.use_sigmoid
    options = dict(class_weight=class_weight, ignore_index=ignore_index, avg_non_ignore=avg_non_ignore, **kwargs)
    elementwise = module.cls_criterion(pred, label, weight, reduction="none", **options)
    valid = label != ignore_index
    if binary:
        valid = valid & (label >= 0)
    normaliser = _normaliser(binary, elementwise, label, valid, reduction, avg_factor, options)
    # The host's value, by the host's own operations, so that it is equal to the bit.
    value = elementwise.mean() if normaliser is None else (elementwise.sum() / normaliser).to(elementwise.dtype)
    return SampleLosses(
        sums=samplewise_sum(elementwise),
        normaliser=elementwise.numel() if normaliser is None else normaliser,
        # One-hot losses have one element per class and pixel.
        counts=valid_per_sample(valid) * (elementwise.numel() // valid.numel()),
        value=value,
        mean_over_valid=_is_mean_over_valid(binary, reduction, avg_factor, class_weight, avg_non_ignore),
    )


def _is_mean_over_valid(
    binary: bool, reduction: str, avg_factor: float | None, class_weight: Tensor | None, avg_non_ignore: bool
) -> bool:
    """Whether :func:`_normaliser` counts valid pixels only, or adds up the weights of their classes."""
    if _given_normaliser(reduction, avg_factor) is not None:
        return False
    return avg_non_ignore or (not binary and class_weight is not None and not _counts_ignored_pixels())


def _normaliser(
    binary: bool,
    elementwise: Tensor,
    label: Tensor,
    valid: Tensor,
    reduction: str,
    avg_factor: float | None,
    options: dict[str, Any],
) -> Tensor | float | None:
    """What the host divides the summed loss by; None stands for a plain mean over all elements.

    Follows ``cross_entropy`` and ``binary_cross_entropy`` of mmseg, without their ``.item()``: counts stay
    tensors, so that no step waits for the device (class weights make it wait in a host where they do in its own).
    """
    given = _given_normaliser(reduction, avg_factor)
    if given is not None:
        return given
    if binary:
        if not options["avg_non_ignore"]:
            return None
        return (valid.sum() * (elementwise.numel() // valid.numel())).float() + _EPS
    class_weight = options["class_weight"]
    if class_weight is not None:
        if not _counts_ignored_pixels():
            return class_weight[label[valid]].sum() + _EPS
        if options["avg_non_ignore"]:
            return torch.where(valid, class_weight[torch.where(valid, label, 0)], 0).sum() + _EPS
        return class_weight[label].sum() + _EPS
    if options["avg_non_ignore"]:
        return valid.sum().float() + _EPS
    return label.numel() + _EPS


@lru_cache(maxsize=1)
def _counts_ignored_pixels() -> bool:
    """Whether this host's class-weighted mean divides by the weights of ignored pixels as well.

    Upstream mmseg does, its fork does not: ask it, with one valid and one ignored pixel.
    """
    pred = torch.zeros(1, 2, 1, 2, dtype=torch.float32, device="cpu")
    label = torch.tensor([[[0, 1]]], dtype=torch.int64, device="cpu")
    loss = cross_entropy(pred, label, class_weight=torch.ones(2, dtype=torch.float32, device="cpu"), ignore_index=1)
    return bool(loss < 0.5)  # ln(2) over one pixel, or over two


# What a batch decides in the losses below is not the same in the loss of each sample.
_mean_over_samples = view_factory(InseparableView, trusted=True, reduction="mean", valid=has_valid_pixel)

# ---- losses that give their elements, or one value for each sample ----------------------------------


def _by_elements(
    module: nn.Module,
    pred: Tensor,
    target: Tensor,
    *args: Any,
    avg_factor: float | None = None,
    reduction_override: str | None = None,
    **kwargs: Any,
) -> SampleLosses:
    elementwise = module(pred, target, *args, reduction_override="none", **kwargs)
    if target.shape != pred.shape:
        valid = target != kwargs.get("ignore_index", 255)
    else:  # depths, of which those up to eps are ignored; or one-hot labels
        valid = target > module.eps if isinstance(module, SiLogLoss) else torch.ones_like(target, dtype=torch.bool)
    pixels = valid_per_sample(valid)
    one_each = elementwise.dim() == 1
    counts = (pixels > 0).long() if one_each else pixels * (elementwise.numel() // valid.numel())
    given = _given_normaliser(reduction_override or module.reduction, avg_factor)
    return SampleLosses(samplewise_sum(elementwise), elementwise.numel() if given is None else given, counts)


def _elements_view(module: nn.Module, weigher: LossWeigher, scored: bool, title: str) -> LossView:
    check_reduction(module, title)
    return VectorisedView(module, weigher, scored, title, _by_elements, trusted=True)


for _loss in (DiceLoss, FocalLoss, SiLogLoss):
    register_loss_factory(_loss, replace=False)(_elements_view)


@register_loss_factory(LovaszLoss, replace=False)
def _lovasz_view(module: nn.Module, weigher: LossWeigher, scored: bool, title: str) -> LossView:
    if module.per_image:
        return _elements_view(module, weigher, scored, title)
    # Sorts the pixels of the whole batch: each one's gradient depends on all others.
    return _mean_over_samples(module, weigher, scored, title)


@register_loss_factory(KLDivLoss, replace=False)
def _kl_divergence_view(module: nn.Module, weigher: LossWeigher, scored: bool, title: str) -> LossView:
    return RowwiseView(module, "forward", weigher, scored, title)


# ---- losses that are evaluated sample by sample -----------------------------------------------------


for _loss in (TverskyLoss, HuasdorffDisstanceLoss):
    _view = view_factory(SeparableView, trusted=True, valid=has_valid_pixel)
    register_loss_factory(_loss, replace=False)(_view)


def _ohem_shares(module: nn.Module, arguments: dict) -> Tensor:
    """What each sample contributes to the mean over the batch's kept pixels, which are found as the host finds them."""
    score, target = arguments["score"], arguments["target"]
    class_weight = module.class_weight
    if class_weight is not None:
        class_weight = moved(torch.tensor(class_weight, dtype=score.dtype, device="cpu"), score.device)
    pixels = F.cross_entropy(score, target, class_weight, ignore_index=module.ignore_label, reduction="none")
    valid = target != module.ignore_label
    confidences = F.softmax(score, dim=1).gather(1, torch.where(valid, target, 0).unsqueeze(1)).squeeze(1)
    ranked = torch.where(valid, confidences, torch.inf).flatten().sort().values
    least = ranked.gather(0, (valid.sum() - 1).clamp(min=0, max=module.min_kept).view(1))
    kept = valid & (confidences < least.clamp(min=module.thresh))
    return module.loss_weight * samplewise_sum(torch.where(kept, pixels, 0)) / kept.sum()


# Keeps the hardest of the valid pixels of the batch: they, and their number, are held like a normaliser.
_view = view_factory(SharesView, trusted=True, valid=has_valid_pixel, mean_over_valid=True, shares=_ohem_shares)
register_loss_factory(OhemCrossEntropy, replace=False)(_view)

# Weighs its two classes by their numbers of pixels in the batch.
register_loss_factory(BoundaryLoss, replace=False)(_mean_over_samples)
