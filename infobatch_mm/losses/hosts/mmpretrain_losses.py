"""MMPretrain's classification losses: each is taken apart by sample in one evaluation.

All of them reduce their elements by one function of the host, which is used here as well: values are equal to
the bit, and normalisers are the host's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mmpretrain.models import losses as host
from mmpretrain.models.losses.cross_entropy_loss import soft_cross_entropy
from mmpretrain.models.losses.seesaw_loss import seesaw_ce_loss
from mmpretrain.models.losses.utils import weight_reduce_loss
from torch import Tensor, nn

from ..elements import samplewise_sum
from ..inseparable import InseparableView
from ..refusals import check_reduction
from ..registry import register_loss_factory
from ..view import LossView
from ..views import SampleLosses, VectorisedView
from ..weigher import LossWeigher

_IGNORED = -100  # torch's default, which the host leaves as it is


def _taken_apart(
    elements: Tensor, reduction: str, avg_factor: float | None, valid: Tensor | None = None, **more: Any
) -> SampleLosses:
    """What the host's ``weight_reduce_loss`` makes of a loss's elements, by sample.

    The score is the host's loss of the sample alone: a sum over its classes where a caller gives the number
    of samples to divide by, as every head does, and their mean where none is given.
    """
    size = len(elements)
    plain_mean = avg_factor is None and reduction == "mean"
    counts = torch.full((size,), elements.numel() // max(size, 1) if plain_mean else 1, device=elements.device)
    if valid is not None:
        counts = counts * valid
    normaliser = 1.0 if reduction == "sum" else elements.numel() if avg_factor is None else avg_factor
    more.setdefault("value", weight_reduce_loss(elements, None, reduction, avg_factor))
    return SampleLosses(samplewise_sum(elements), normaliser, counts, **more)


# ---- losses with a function below forward, where the host's value can be had by the host's own operations ----


def _cross_entropy(
    module: nn.Module,
    pred: Tensor,
    label: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    avg_factor: float | None = None,
    **options: Any,
) -> SampleLosses:
    elements = module.cls_criterion(pred, label, weight, reduction="none", **options)

    def entropy() -> Tensor:
        """The loss of the best prediction there is: targets of mixed images, or smoothed ones, are soft."""
        target = label.to(torch.promote_types(pred.dtype, torch.float32))
        per_class = torch.special.entr(target)
        return (per_class + torch.special.entr(1 - target) if module.use_sigmoid else per_class).sum(1)

    weighted = any(each is not None for each in options.values())  # by class: there is no such simple minimum
    soft = label.shape == pred.shape and not weighted
    valid = None if label.is_floating_point() or module.use_sigmoid or label.dim() > 1 else label != _IGNORED
    return _taken_apart(elements, reduction, avg_factor, valid, floor=entropy if soft else None)


def _seesaw(module: nn.Module, pred: Tensor, label: Tensor, weight: Tensor | None, *settings: Any) -> SampleLosses:
    *constants, reduction, avg_factor = settings
    elements = module.cls_criterion(pred, label, weight, *constants, "none", None)
    return _taken_apart(elements, reduction, avg_factor)


def _criterion_view(
    module: nn.Module, weigher: LossWeigher, scored: bool, title: str, scaled_by: nn.Module | None = None
) -> LossView:
    check_reduction(module, title)
    functions: dict[Any, Callable[..., SampleLosses]] = {
        host.cross_entropy: _cross_entropy,
        soft_cross_entropy: _cross_entropy,
        host.binary_cross_entropy: _cross_entropy,
        seesaw_ce_loss: _seesaw,
    }
    criterion = module.cls_criterion
    function = functions.get(criterion.host if isinstance(criterion, LossView) else criterion)
    if function is None:  # a user's own
        return InseparableView(module, weigher, scored, title)
    scaled_by = scaled_by or module
    return VectorisedView(module, weigher, scored, title, function, "cls_criterion", scaled_by=scaled_by, trusted=True)


for _loss in (host.CrossEntropyLoss, host.SeesawLoss):
    register_loss_factory(_loss, replace=False)(_criterion_view)


@register_loss_factory(host.LabelSmoothLoss, replace=False)
def _label_smooth_view(module: nn.Module, weigher: LossWeigher, scored: bool, title: str) -> LossView:
    return _criterion_view(module.ce, weigher, scored, title, scaled_by=module)


# ---- losses that give their elements ----------------------------------------------------------------


def _by_elements(
    module: nn.Module,
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    avg_factor: float | None = None,
    reduction_override: str | None = None,
) -> SampleLosses:
    elements = module(pred, target, weight, reduction_override="none")
    value = {}
    if module.loss_weight != 1:  # the elements have it in them already, which rounds otherwise than the host does
        with torch.no_grad():
            value["value"] = module(pred, target, weight, avg_factor, reduction_override)
    return _taken_apart(elements, reduction_override or module.reduction, avg_factor, **value)


def _elements_view(module: nn.Module, weigher: LossWeigher, scored: bool, title: str) -> LossView:
    check_reduction(module, title)
    return VectorisedView(module, weigher, scored, title, _by_elements, trusted=True)


# RegressionLoss is the fork's.
for _name in ("FocalLoss", "AsymmetricLoss", "RegressionLoss"):
    if hasattr(host, _name):
        register_loss_factory(getattr(host, _name), replace=False)(_elements_view)
