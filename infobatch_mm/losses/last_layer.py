"""The last layer of a host's model, where the norms of samples' gradients come from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.sample_norms import is_known
from .view import LossView
from .weigher import LossWeigher

#: Where models of the hosts have the layer that their scored loss is computed from.
_PLACES = ("decode_head.conv_seg", "head.fc", "head.layers.head", "neck.decoder_pred")


class LastLayerView(LossView):
    """Stands in for the ``forward`` of a model's last layer: watches the gradient that comes back to its output."""

    def __init__(self, owner: nn.Module, weigher: LossWeigher, title: str) -> None:
        super().__init__(owner, "forward", weigher, scored=False, title=title)

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        output = self.host(*args, **kwargs)
        batch = self.weigher.batch
        is_batch = isinstance(output, Tensor) and output.requires_grad and args and len(output) == batch.size
        # Checkpointed models are run twice: here without a gradient, and then with one.
        if is_batch and batch.norms is not None and torch.is_grad_enabled():
            batch.norms.watch_layer(self.owner, args[0], output)
            batch.norms_of = "layer"
        return output


def last_layer_views(model: nn.Module, weigher: LossWeigher, place: str | None) -> list[LossView]:
    """The view of a model's last layer; none where it has none that is known.

    Args:
        model (nn.Module): The model, not wrapped.
        weigher (LossWeigher): Weights and scores of the batch.
        place (str, optional): Where the user says it is, such as ``'decode_head.conv_seg'``. Defaults to the place in
            the hosts' own models.

    Raises:
        ValueError: If nothing is at the user's place, or its gradient cannot be taken apart by sample.
    """
    for path in _PLACES if place is None else (place,):
        layer = _at(model, path)
        if layer is not None and is_known(layer):
            return [LastLayerView(layer, weigher, f"{path} ({type(layer).__name__})")]
    if place is not None:
        found = _at(model, place)
        what = "has nothing there" if found is None else f"has a {type(found).__name__} there"
        raise ValueError(
            f"score=dict(type='gradient', layer={place!r}): {type(model).__name__} {what}, expected an nn.Linear or a "
            "convolution without groups; name the layer that the scored loss is computed from, or leave layer out"
        )
    return []


def _at(model: nn.Module, path: str) -> nn.Module | None:
    found: Any = model
    for name in path.split("."):
        if isinstance(found, nn.ModuleList) and not name.lstrip("-").isdecimal():
            found = found[-1] if len(found) else None  # of a cascade the last stage is scored
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None
