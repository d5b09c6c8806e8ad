"""Per-sample views of host losses: one file per host, imported only where the host is."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

from torch import nn

from .attach import AttachedViews
from .head_rules import FunctionRule, HeadRule, ModulesRule, SamplewiseRule
from .last_layer import last_layer_views
from .registry import (
    register_head_rule,
    register_head_view,
    register_loss_view,
    register_samplewise_loss,
    register_separable_loss,
)
from .view import LossView
from .views import SampleLosses
from .weigher import LossWeigher

#: Host package of a model class -> module with its ``loss_views(model, weigher, score_auxiliary)``.
_HOSTS = {
    "mmseg": "infobatch_mm.losses.hosts.mmseg",
    "mmdet": "infobatch_mm.losses.hosts.mmdet",
    "mmpretrain": "infobatch_mm.losses.hosts.mmpretrain",
}


def attach_views(
    model: nn.Module, weigher: LossWeigher, score_auxiliary: bool = False, last_layer: str | None = None
) -> AttachedViews:
    """Make the losses of a host's model weigh and score its samples.

    Args:
        model (nn.Module): The model, not wrapped.
        weigher (LossWeigher): Weights and scores of the batch in hand.
        score_auxiliary (bool): Whether auxiliary losses count in the score. Defaults to False.
        last_layer (str, optional): Where the model has its last layer, for scores that are norms of gradients. Defaults
            to where the hosts' own models have it.

    Returns:
        AttachedViews: What was attached; its ``restore()`` gives the model back to the host.

    Raises:
        ValueError: With the name of what cannot be weighed and what to do.
    """
    for cls in type(model).__mro__:
        module = _HOSTS.get(cls.__module__.partition(".")[0])
        if module is not None:
            views = importlib.import_module(module).loss_views
            return AttachedViews(partial(_views, views, model, weigher, score_auxiliary, last_layer))
    raise ValueError(
        f"the losses of {type(model).__name__} cannot be weighed per sample: InfoBatchHook knows the models of "
        f"{', '.join(sorted(_HOSTS))}; in a loop of your own use infobatch_mm.InfoBatch"
    )


def _views(
    views: Callable[..., list[LossView]],
    model: nn.Module,
    weigher: LossWeigher,
    score_auxiliary: bool,
    place: str | None,
) -> list[LossView]:
    found = views(model, weigher, score_auxiliary)
    return [*found, *last_layer_views(model, weigher, place)] if weigher.takes_norms else found


__all__ = [
    "AttachedViews",
    "FunctionRule",
    "HeadRule",
    "LossWeigher",
    "ModulesRule",
    "SampleLosses",
    "SamplewiseRule",
    "attach_views",
    "register_head_rule",
    "register_head_view",
    "register_loss_view",
    "register_samplewise_loss",
    "register_separable_loss",
]
