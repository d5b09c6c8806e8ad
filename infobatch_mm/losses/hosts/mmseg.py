"""MMSegmentation: which of its heads and losses are weighed how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mmseg.models.decode_heads.da_head import DAHead
from mmseg.models.decode_heads.ddr_head import DDRHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.decode_heads.enc_head import EncHead
from mmseg.models.decode_heads.knet_head import IterativeDecodeHead
from mmseg.models.decode_heads.mask2former_head import Mask2FormerHead
from mmseg.models.decode_heads.maskformer_head import MaskFormerHead
from mmseg.models.decode_heads.pid_head import PIDHead
from mmseg.models.decode_heads.point_head import PointHead
from mmseg.models.decode_heads.san_head import SideAdapterCLIPHead
from mmseg.models.decode_heads.stdc_head import STDCHead
from mmseg.models.decode_heads.vpd_depth_head import VPDDepthHead
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from ..attach import head_views
from ..dissect.arguments import LAYERS_FIRST, have_instances
from ..head_rules import ModulesRule, SamplewiseRule
from ..inseparable import InseparableView
from ..model_views import model_views
from ..refusals import HOW_TO
from ..registry import register_head_rule, view_factory
from ..view import LossView
from ..weigher import LossWeigher
from .mmseg_losses import has_valid_pixel

# Their losses all come from loss modules that are called with (B, ...) predictions and labels.
for _head in (
    BaseDecodeHead,
    EncHead,
    DAHead,
    DDRHead,
    PIDHead,
    STDCHead,
    PointHead,
    IterativeDecodeHead,
    VPDDepthHead,
):
    register_head_rule(_head, ModulesRule(), replace=False)


# Set prediction: masks are matched to instances, and normalised by the number of instances in the batch.
# An image without a valid pixel has none.
for _head in (MaskFormerHead, Mask2FormerHead, SideAdapterCLIPHead):
    _rule = SamplewiseRule(trusted=True, reduction="mean", axes=LAYERS_FIRST, valid=have_instances)
    register_head_rule(_head, _rule, replace=False)


def loss_views(model: nn.Module, weigher: LossWeigher, score_auxiliary: bool = False) -> list[LossView]:
    """The views that make the losses of a segmentor or depth estimator weigh and score its samples.

    Args:
        model (nn.Module): A ``BaseSegmentor``, not wrapped.
        weigher (LossWeigher): Weights and scores of the batch in hand.
        score_auxiliary (bool): Whether auxiliary heads, and the earlier stages of a cascade, count in the
            score. Defaults to False: the score is the main head's loss.

    Returns:
        list[LossView]: Not attached yet.

    Raises:
        ValueError: With the name of what cannot be weighed and what to do.
    """
    rule, loss = SamplewiseRule(), view_factory(InseparableView, valid=has_valid_pixel)
    views = [
        view
        for name, head, main in _heads(model)
        for view in head_views(name, head, weigher, main or score_auxiliary, rule, loss, _has_labelled_pixel)
    ]
    if not views:
        raise ValueError(f"{type(model).__name__} has no decode_head: its losses cannot be weighed; {HOW_TO}")
    if not any(view.scored for view in views):
        raise ValueError(
            f"the decode_head of {type(model).__name__} has no loss to score by: its loss_name needs 'loss'"
        )
    return [*views, *model_views(model, weigher, _labelled)]


def _heads(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Name, head, and whether it is the main one; of a cascade the last stage is."""
    for attribute in ("decode_head", "auxiliary_head"):
        heads = getattr(model, attribute, None)
        if isinstance(heads, nn.ModuleList):
            for i, head in enumerate(heads):
                yield f"{attribute}.{i}", head, attribute == "decode_head" and i == len(heads) - 1
        elif heads is not None:
            yield attribute, heads, attribute == "decode_head"


def _labelled(model: nn.Module, data_samples: Sequence[Any]) -> Tensor | None:
    """Which images have a pixel that the main head does not ignore; None for data without segmentations."""
    head = model.decode_head[-1] if isinstance(model.decode_head, nn.ModuleList) else model.decode_head
    return _has_labelled_pixel(head, dict(data_samples=data_samples))


def _has_labelled_pixel(head: nn.Module, arguments: dict) -> Tensor | None:
    """The same for a head that is evaluated with its data samples."""
    ignore_index = getattr(head, "ignore_index", 255)
    for value in arguments.values():
        if isinstance(value, (list, tuple)) and value and all(_has_segmentation(each) for each in value):
            return torch.stack([(each.gt_sem_seg.data != ignore_index).any() for each in value])
    return None


def _has_segmentation(sample: object) -> bool:
    return isinstance(sample, SegDataSample) and "gt_sem_seg" in sample
