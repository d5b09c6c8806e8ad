"""Per-sample views of MMSegmentation's losses.

A view sits where a loss module calls its criterion, computes the host's elementwise loss once, and takes
three things from it: the host's own value (for the log), the weighted objective (for the gradient) and
each sample's score. Normalisers are the host's and never see a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from mmseg.models.decode_heads.cascade_decode_head import BaseCascadeDecodeHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses.cross_entropy_loss import CrossEntropyLoss, binary_cross_entropy, cross_entropy
from mmseg.models.segmentors import CascadeEncoderDecoder, EncoderDecoder
from torch import Tensor, nn

from .weigher import LossWeigher, samplewise_sum, valid_per_sample

_ADVICE = "use CrossEntropyLoss on a head with MMSegmentation's standard loss_by_feat, or train without InfoBatchHook"


class CrossEntropyView:
    """Stands in for the criterion of one ``CrossEntropyLoss`` module.

    Args:
        criterion (Callable): The host's ``cross_entropy`` or ``binary_cross_entropy``.
        weigher (LossWeigher): Weights and scores of the batch.
        scored (bool): Whether this loss is part of the samples' scores.
        loss_weight (float): The module's ``loss_weight``, so that several losses of a head add up in the
            score as they do in the loss.
    """

    def __init__(self, criterion: Callable, weigher: LossWeigher, scored: bool, loss_weight: float) -> None:
        self.criterion = criterion
        self.weigher = weigher
        self.scored = scored
        self.loss_weight = loss_weight

    def __call__(
        self,
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
    ) -> Tensor:
        options = dict(class_weight=class_weight, ignore_index=ignore_index, avg_non_ignore=avg_non_ignore, **kwargs)
        # Pixel samplers ask for elementwise losses to choose pixels by: those are not optimised.
        if not self.weigher.active or reduction == "none":
            return self.criterion(pred, label, weight, reduction=reduction, avg_factor=avg_factor, **options)

        elementwise = self.criterion(pred, label, weight, reduction="none", **options)
        valid = label != ignore_index
        if self.criterion is binary_cross_entropy:
            valid = valid & (label >= 0)
        normaliser = _normaliser(self.criterion, elementwise, label, valid, reduction, avg_factor, options)
        # The host's value, by the host's own operations, so that it is equal to the bit.
        host_loss = elementwise.mean() if normaliser is None else (elementwise.sum() / normaliser).to(elementwise.dtype)
        per_sample = samplewise_sum(elementwise)
        if self.scored:
            self._score(per_sample, elementwise, valid)
        return self.weigher.weigh(per_sample, host_loss, elementwise.numel() if normaliser is None else normaliser)

    def _score(self, per_sample: Tensor, elementwise: Tensor, valid: Tensor) -> None:
        pixels = valid_per_sample(valid)
        # One-hot losses have one element per class and pixel.
        elements = pixels * (elementwise.numel() // valid.numel())
        self.weigher.score(self, self.loss_weight * per_sample.detach() / elements, pixels > 0)

    # Copies of the model (an EMA model, a pickled one) get the host's criterion back: they are not part
    # of this run.
    def __deepcopy__(self, memo: dict) -> Callable:
        return self.criterion

    def __reduce__(self) -> tuple:
        return _identity, (self.criterion,)


def _normaliser(
    criterion: Callable,
    elementwise: Tensor,
    label: Tensor,
    valid: Tensor,
    reduction: str,
    avg_factor: float | None,
    options: dict[str, Any],
) -> Tensor | float | None:
    """What the host divides the summed loss by; None stands for a plain mean over all elements.

    Follows ``cross_entropy`` and ``binary_cross_entropy`` of mmseg, without their ``.item()``: counts stay
    tensors, so that no step waits for the device (class weights make it wait, as they do in the host).
    """
    if reduction == "sum":
        return 1.0
    eps = torch.finfo(torch.float32).eps
    if avg_factor is not None:
        return avg_factor + eps
    if criterion is binary_cross_entropy:
        if not options["avg_non_ignore"]:
            return None
        return (valid.sum() * (elementwise.numel() // valid.numel())).float() + eps
    class_weight = options["class_weight"]
    if class_weight is not None:
        counted = valid if options["avg_non_ignore"] or not _counts_ignored_pixels() else valid.new_ones(label.shape)
        return class_weight[label[counted]].sum() + eps
    if options["avg_non_ignore"]:
        return valid.sum().float() + eps
    return label.numel() + eps


@lru_cache(maxsize=1)
def _counts_ignored_pixels() -> bool:
    """Whether this host's class-weighted mean divides by the weights of ignored pixels as well.

    Upstream mmseg does, its fork does not: ask it, with one valid and one ignored pixel.
    """
    pred, label = torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 1]]])
    loss = cross_entropy(pred, label, class_weight=torch.ones(2), ignore_index=1)
    return bool(loss < 0.5)  # ln(2) over one pixel, or over two


def attach_views(model: nn.Module, weigher: LossWeigher, score_auxiliary: bool = False) -> Callable[[], None]:
    """Make the losses of a segmentor weigh and score its samples.

    Args:
        model (nn.Module): An ``EncoderDecoder`` or ``CascadeEncoderDecoder``, not wrapped.
        weigher (LossWeigher): Weights and scores of the batch in hand.
        score_auxiliary (bool): Whether auxiliary heads, and the earlier stages of a cascade, count in the
            score. Defaults to False: the score is the main head's loss.

    Returns:
        Callable: Restores the model when called.

    Raises:
        ValueError: With the name of what cannot be weighed and what to do.
    """
    _check_segmentor(model)
    attached: list[nn.Module] = []
    planned = [
        (module, scored or score_auxiliary)
        for name, head, scored in _heads(model)
        for module in _checked_losses(name, head)
    ]
    # The host trains on what has "loss" in its name and only displays the rest.
    planned = [(module, scored and "loss" in module.loss_name) for module, scored in planned]
    if not any(scored for _, scored in planned):
        raise ValueError(
            f"the decode_head of {type(model).__name__} has no loss to score by: its loss_name needs 'loss'"
        )
    for module, scored in planned:
        module.cls_criterion = CrossEntropyView(module.cls_criterion, weigher, scored, float(module.loss_weight))
        attached.append(module)

    def restore() -> None:
        while attached:
            module = attached.pop()
            module.cls_criterion = module.cls_criterion.criterion

    return restore


def _check_segmentor(model: nn.Module) -> None:
    if not isinstance(model, EncoderDecoder):
        raise ValueError(f"the losses of {type(model).__name__} cannot be weighed per sample yet: {_ADVICE}")
    cascade = isinstance(model, CascadeEncoderDecoder)
    standard = CascadeEncoderDecoder if cascade else EncoderDecoder
    for method in ("loss", "_decode_head_forward_train", "_auxiliary_head_forward_train"):
        if getattr(type(model), method) is not getattr(standard, method):
            raise ValueError(
                f"{type(model).__name__} has its own {method}(): its losses cannot be weighed per sample yet: {_ADVICE}"
            )


def _heads(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Name, head, and whether it is the main one; of a cascade the last stage is."""
    if isinstance(model, CascadeEncoderDecoder):
        stages = list(model.decode_head)
        for i, stage in enumerate(stages):
            yield f"decode_head.{i}", stage, i == len(stages) - 1
    else:
        yield "decode_head", model.decode_head, True
    if model.with_auxiliary_head:
        auxiliary = model.auxiliary_head
        if isinstance(auxiliary, nn.ModuleList):
            for i, head in enumerate(auxiliary):
                yield f"auxiliary_head.{i}", head, False
        else:
            yield "auxiliary_head", auxiliary, False


def _checked_losses(name: str, head: nn.Module) -> list[nn.Module]:
    """The loss modules of a head, once each is known to be one we weigh exactly."""
    title = f"{name} ({type(head).__name__})"
    standard_loss = (BaseDecodeHead.loss, BaseCascadeDecodeHead.loss)
    if (
        getattr(type(head), "loss_by_feat", None) is not BaseDecodeHead.loss_by_feat
        or getattr(type(head), "loss", None) not in standard_loss
    ):
        raise ValueError(
            f"{title} computes its losses in its own way, they cannot be weighed per sample yet: {_ADVICE}"
        )
    modules = list(head.loss_decode) if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]
    for module in modules:
        loss = f"{title} has the loss {type(module).__name__}"
        if type(module) is not CrossEntropyLoss:
            raise ValueError(f"{loss}, which cannot be weighed per sample yet: {_ADVICE}")
        if isinstance(module.cls_criterion, CrossEntropyView):
            raise ValueError(f"{loss}, which is weighed by another hook already: keep one InfoBatchHook per model")
        if module.cls_criterion not in (cross_entropy, binary_cross_entropy):
            raise ValueError(f"{loss} with use_mask=True, which cannot be weighed per sample yet: {_ADVICE}")
        if module.reduction not in ("mean", "sum"):
            raise ValueError(f"{loss} with reduction={module.reduction!r}: use reduction='mean'")
    return modules


def _identity(criterion: Callable) -> Callable:
    return criterion
