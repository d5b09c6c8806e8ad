"""MMDetection: its dense, query and RoI heads, evaluated sample by sample.

Their losses are normalised by the number of positives in the batch, so they do not separate over samples:
in pruned passes each sample's own loss is optimised (see :class:`.InseparableView`).
"""

from __future__ import annotations

from collections.abc import Iterator

from mmdet.models.detectors.single_stage_instance_seg import SingleStageInstanceSegmentor
from torch import Tensor, nn

from ..attach import head_views
from ..dissect.arguments import LAYERS_FIRST, bools, have_instances
from ..head_rules import SamplewiseRule
from ..model_views import model_views
from ..refusals import HOW_TO, cannot_be_weighed
from ..view import LossView
from ..weigher import LossWeigher


def _rois_of_samples(head: nn.Module, arguments: dict) -> dict[str, list[int]]:
    """RoIs of all images are concatenated, image by image; mask heads see the positive ones only."""
    sampled = arguments["sampling_results"]
    counts = [len(result.pos_priors) for result in sampled]
    if "mask_preds" not in arguments:
        counts = [positive + len(result.neg_priors) for positive, result in zip(counts, sampled, strict=True)]
    return {
        name: counts for name, value in arguments.items() if isinstance(value, Tensor) and len(value) == sum(counts)
    }


def _has_boxes(head: nn.Module, arguments: dict) -> Tensor | None:
    """Which images have something to find: a loss over no positives has no size to be compared by."""
    if "sampling_results" in arguments:
        return bools([len(result.pos_priors) > 0 for result in arguments["sampling_results"]])
    return have_instances(head, arguments)


def loss_views(model: nn.Module, weigher: LossWeigher, score_auxiliary: bool = False) -> list[LossView]:
    """The views that make the losses of a detector weigh and score its samples.

    Args:
        model (nn.Module): A ``BaseDetector``, not wrapped.
        weigher (LossWeigher): Weights and scores of the batch in hand.
        score_auxiliary (bool): Without effect: the score of an image is the sum of all its losses.

    Returns:
        list[LossView]: Not attached yet.

    Raises:
        ValueError: With the name of what cannot be weighed and what to do.
    """
    if isinstance(model, SingleStageInstanceSegmentor) and model.with_bbox:
        raise cannot_be_weighed(
            type(model).__name__, "its mask head trains on what its bbox head remembers of the batch"
        )
    views = [
        view
        for name, head, rule in _heads(model)
        for view in head_views(name, head, weigher, scored=True, default=rule, valid=_has_boxes)
    ]
    if not views:
        raise ValueError(f"{type(model).__name__} has no head with loss_by_feat() or loss_and_target(); {HOW_TO}")
    return [*views, *model_views(model, weigher)]


def _heads(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, SamplewiseRule]]:
    """The outermost modules that compute losses from predictions, and how."""
    for name, child in module.named_children():
        name = prefix + name
        ours = type(child).__module__.startswith(("mmdet.", "mmseg."))
        if callable(getattr(child, "loss_and_target", None)):
            # MMDetection's are means over the RoIs of the batch.
            reduction = "mean" if ours else None
            rule = SamplewiseRule(method="loss_and_target", trusted=ours, reduction=reduction, rows=_rois_of_samples)
            yield name, child, rule
        elif callable(getattr(child, "loss_by_feat", None)):
            yield name, child, SamplewiseRule(axes=LAYERS_FIRST, trusted=ours)
        else:
            yield from _heads(child, f"{name}.")
