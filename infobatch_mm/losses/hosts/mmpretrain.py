"""MMPretrain: which of its models, classification heads and losses are weighed how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mmpretrain.models import heads
from mmpretrain.models.classifiers import BaseClassifier
from mmpretrain.models.heads import MultiTaskHead
from mmpretrain.models.retrievers import ImageToImageRetriever
from mmpretrain.models.selfsup import BaseSelfSupervisor
from torch import nn

from ..attach import head_views, module_views
from ..dissect.results import losses_in, replace_losses
from ..head_rules import BaseHeadRule, ModulesRule, SamplewiseRule
from ..mixing import MixingView
from ..model_views import model_views
from ..refusals import HOW_TO, cannot_be_weighed
from ..registry import head_rule, register_head_rule
from ..view import LossView
from ..weigher import LossWeigher
from . import mmpretrain_losses  # noqa: F401  (registers the views of losses)
from .mmpretrain_selfsup import self_supervised_views

# Their losses all come from one loss module, which is called with (B, ...) predictions and targets.
for _head in (heads.ClsHead, heads.MultiLabelClsHead, heads.ConformerHead, heads.EfficientFormerClsHead):
    register_head_rule(_head, ModulesRule(method="_get_loss", overrides=("loss",)), replace=False)
register_head_rule(heads.ArcFaceClsHead, ModulesRule(method="loss"), replace=False)


class TaskView(LossView):
    """Stands in for the ``loss`` of one task of a multi-task head, which sees the samples that have this task.

    Args:
        owner (nn.Module): The task's head.
        task (str): The task's name in the data samples.
        weigher (LossWeigher): Weights and scores of the batch.
        title (str): The head's name, for messages.
    """

    def __init__(self, owner: nn.Module, task: str, weigher: LossWeigher, title: str) -> None:
        super().__init__(owner, "loss", weigher, scored=False, title=title)
        self.task = task

    def weighed(self, feats: Any, data_samples: Sequence[Any], **kwargs: Any) -> Any:
        rows = [i for i, sample in enumerate(data_samples) if self.task in sample]
        if not rows:  # the host gives a 0 that trains nothing
            result = self.host(feats, data_samples, **kwargs)
            losses = dict(losses_in(result))
            for loss in losses.values():
                nothing = loss.new_zeros(len(data_samples))
                self.weigher.score(nothing, nothing.bool())
            return replace_losses(result, {path: self.weigher.mark(loss) for path, loss in losses.items()})
        with self.weigher.narrowed(rows, [data_samples[i].get(self.task) for i in rows]):
            return self.host(feats, data_samples, **kwargs)


def loss_views(model: nn.Module, weigher: LossWeigher, score_auxiliary: bool = False) -> list[LossView]:
    """The views that make the losses of a classifier or a self-supervised model weigh and score its samples.

    Args:
        model (nn.Module): A ``BaseClassifier``, an ``ImageToImageRetriever`` or a ``BaseSelfSupervisor``, not wrapped.
        weigher (LossWeigher): Weights and scores of the batch in hand.
        score_auxiliary (bool): Without effect: the score of an image is the sum of all its losses.

    Returns:
        list[LossView]: Not attached yet.

    Raises:
        ValueError: With the name of what cannot be weighed and what to do.
    """
    if isinstance(model, BaseSelfSupervisor):
        return [*self_supervised_views(model, weigher), *_mixing(model, weigher), *model_views(model, weigher)]
    if not isinstance(model, (BaseClassifier, ImageToImageRetriever)):
        raise ValueError(
            f"{type(model).__name__} cannot be weighed: of MMPretrain's models the classifiers, "
            "the self-supervised models and ImageToImageRetriever are supported; train it without InfoBatchHook"
        )
    head = getattr(model, "head", None)
    if head is not None:
        views = list(_head_views("head", head, weigher))
    elif isinstance(getattr(model, "loss_module", None), nn.Module):  # timm's and Hugging Face's have no head
        views = list(_headless_views(model, weigher))
    else:
        raise ValueError(f"{type(model).__name__} has no head and no loss_module: nothing to weigh; {HOW_TO}")
    return [*views, *_mixing(model, weigher), *model_views(model, weigher)]


def _headless_views(model: nn.Module, weigher: LossWeigher) -> Iterator[LossView]:
    """Views of a classifier that calls its loss module itself, in a ``_get_loss`` as the host's do."""
    if not hasattr(model, "_get_loss"):
        yield from module_views("model", model, weigher, scored=True)
        return
    ours = all(_definer(model, method).__module__.startswith("mmpretrain.") for method in ("loss", "_get_loss"))
    rule: BaseHeadRule = ModulesRule(method="_get_loss") if ours else SamplewiseRule(method="_get_loss")
    yield from head_views("model", model, weigher, scored=True, default=rule)


def _definer(module: nn.Module, method: str) -> type:
    """The class that a module has a method from."""
    return next((cls for cls in type(module).__mro__ if method in vars(cls)), object)


def _head_views(name: str, head: nn.Module, weigher: LossWeigher, task: bool = False) -> Iterator[LossView]:
    if isinstance(head, MultiTaskHead) and type(head).loss is MultiTaskHead.loss:
        for key, child in head.task_heads.items():
            each = f"{name}.task_heads.{key}"
            # Before the head's own views: one may want the same place, and sees the same samples.
            yield TaskView(child, key, weigher, each)
            yield from _head_views(each, child, weigher, task=True)
        return
    default = SamplewiseRule(method=_loss_method(head))
    if task and head_rule(head) is None and default.method == "loss":
        raise cannot_be_weighed(f"{name} ({type(head).__name__})", "a head of a task has a loss() of its own")
    yield from head_views(name, head, weigher, scored=True, default=default)


def _loss_method(head: nn.Module) -> str:
    """The method by which a head that nobody registered computes its losses from what it is given."""
    return "_get_loss" if _definer(head, "loss") in (heads.ClsHead, heads.MultiLabelClsHead) else "loss"


def _mixing(model: nn.Module, weigher: LossWeigher) -> Iterator[LossView]:
    preprocessor = model.data_preprocessor
    augment = getattr(preprocessor, "batch_augments", None)
    if augment is not None:
        parts = [augment, *getattr(augment, "augments", [])]
        known = all(part is None or type(part).__module__.startswith("mmpretrain.") for part in parts)
        if isinstance(augment, nn.Module):  # nothing but a module may take its place
            yield MixingView(augment, "forward", weigher, trusted=known)
        else:
            yield MixingView(preprocessor, "batch_augments", weigher, trusted=known)
