"""Views: what stands between a host's loss and the host, for the length of one run.

A view takes the place of one attribute of a module (a loss's ``forward``, a head's ``loss_by_feat``), calls
what it replaced, and gives the host the same value with a weighted gradient. Those here take the loss of
every sample from one evaluation; ``samplewise.py`` has the one that works for any loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .coverage import check_coverage
from .proof import check_order
from .results import losses_in
from .weigher import HOW_TO, LossWeigher


class LossView:
    """Stands in for one attribute of a module.

    Args:
        owner (nn.Module): The module.
        attribute (str): The method or function to stand in for.
        weigher (LossWeigher): Weights and scores of the batch.
        scored (bool): Whether this loss is part of the samples' scores.
        title (str): The loss's name for messages.
    """

    #: Whether the losses of all samples come from one evaluation.
    vectorised = True

    def __init__(self, owner: nn.Module, attribute: str, weigher: LossWeigher, scored: bool, title: str = "") -> None:
        self.owner = owner
        self.attribute = attribute
        self.weigher = weigher
        self.scored = scored
        self.title = title or f"{type(owner).__name__}.{attribute}"
        self.host: Callable = getattr(owner, attribute)
        self._replaced = attribute in vars(owner)
        self._inside = False

    def attach(self) -> None:
        """Take the host's place."""
        setattr(self.owner, self.attribute, self)

    def restore(self) -> None:
        """Give the host its place back."""
        if self._replaced:
            setattr(self.owner, self.attribute, self.host)
        else:
            delattr(self.owner, self.attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A view that calls its own module means the host.
        if self._inside or not self.weigher.active:
            return self.host(*args, **kwargs)
        self._inside = True
        try:
            return self.weighed(*args, **kwargs)
        finally:
            self._inside = False

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        """The host's result with a weighted gradient; called while a batch is in hand."""
        raise NotImplementedError

    # Copies of the model (an EMA model, a pickled one) get the host's own method back: they are not part
    # of this run.
    def __deepcopy__(self, memo: dict) -> Callable:
        if self._replaced:
            return self.host
        return getattr(type(self.owner), self.attribute).__get__(copy.deepcopy(self.owner, memo))

    def __reduce__(self) -> tuple:
        if self._replaced:
            return _identity, (self.host,)
        return _method_of, (self.owner, self.attribute)


@dataclass
class SampleLosses:
    """A loss, taken apart by sample: what a vectorised view returns.

    The host's loss is ``sums.sum() / normaliser``.

    Attributes:
        sums (Tensor): The loss summed over each sample, shape ``(B,)``, with gradient.
        normaliser (Tensor | float): What the host divides by; no weight may enter it.
        counts (Tensor): Number of valid elements (pixels, tokens) in each sample, shape ``(B,)``. The score
            is sums / counts; a sample without a valid element is not scored.
        value (Tensor, optional): The host's own value, where it can be had to the bit.
    """

    sums: Tensor
    normaliser: Tensor | float
    counts: Tensor
    value: Tensor | None = None


class VectorisedView(LossView):
    """Takes the losses of all samples from one evaluation of a function.

    Args:
        function (Callable): Called as ``function(module, *args, **kwargs)`` with the arguments of the
            host's call, returns :class:`SampleLosses`. A call of the module inside it is the host's.
        scale (float): Factor that the host applies to what this view returns. Defaults to 1.
    """

    def __init__(
        self,
        owner: nn.Module,
        weigher: LossWeigher,
        scored: bool,
        title: str,
        function: Callable[..., SampleLosses],
        attribute: str = "forward",
        scale: float = 1.0,
    ) -> None:
        super().__init__(owner, attribute, weigher, scored, title)
        self.function = function
        self.scale = scale

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        if asks_for_elements(kwargs):
            return self.host(*args, **kwargs)
        losses = self.function(self.owner, *args, **kwargs)
        if self.scored:
            self.weigher.score(self.scale * losses.sums.detach() / losses.counts, losses.counts > 0)
        value = losses.sums.sum() / losses.normaliser if losses.value is None else losses.value
        return self.weigher.weigh(losses.sums, value, losses.normaliser, self.title)


class RowwiseView(LossView):
    """For losses that return a value, or elements, of each sample: shape ``(B, ...)``.

    However the head reduces them, the gradient that comes back to each row is multiplied by its weight.
    """

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        losses = self.host(*args, **kwargs)
        if len(losses) != self.weigher.batch_size:
            raise ValueError(
                f"{self.title} gives {len(losses)} values for a batch of {self.weigher.batch_size}: expected one row "
                f"for each sample; {HOW_TO}"
            )
        if self.scored:
            scores = losses.detach().flatten(1).mean(1) if losses.dim() > 1 else losses.detach()
            self.weigher.score(scores, torch.ones_like(scores, dtype=torch.bool))
        return self.weigher.scale_gradient(losses)


class OrderView(LossView):
    """Stands in for a ``loss_by_feat`` whose loss modules are weighed: checks the order of its samples."""

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        check_order(self.title, self.weigher.data_samples, (*args, *kwargs.values()))
        return self.host(*args, **kwargs)


class ModelView(LossView):
    """Stands in for a model's ``loss``: counts each call as one forward pass, and lets no loss go unweighed."""

    def __init__(self, owner: nn.Module, weigher: LossWeigher) -> None:
        super().__init__(owner, "loss", weigher, scored=False)
        self._checked: set[bool] = set()

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        self.weigher.restart()
        for value in (*args, *kwargs.values()):
            if isinstance(value, (list, tuple)) and len(value) == self.weigher.batch_size:
                self.weigher.data_samples = value
        losses = self.host(*args, **kwargs)
        if torch.is_grad_enabled() and self.weigher.pruned not in self._checked:
            check_coverage(self.owner, dict(losses_in(losses)))
            self._checked.add(self.weigher.pruned)
        return losses


def asks_for_elements(kwargs: dict[str, Any]) -> bool:
    """Whether a loss is called for its elements: pixel samplers choose pixels by them, nothing is optimised."""
    return "none" in (kwargs.get("reduction_override"), kwargs.get("reduction"))


def _identity(host: Callable) -> Callable:
    return host


def _method_of(owner: nn.Module, attribute: str) -> Callable:
    return getattr(type(owner), attribute).__get__(owner)
