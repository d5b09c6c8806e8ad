"""A view: what stands between a host's loss and the host, for the length of one run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from .norms import watch_outputs
from .weigher import LossWeigher


class LossView:
    """Stands in for one attribute of a module.

    It takes the place of a loss's ``forward``, say, or of a head's ``loss_by_feat``, calls what it replaced, and gives
    the host the value back with a weighted gradient.

    Args:
        owner (nn.Module): The module.
        attribute (str): The method or function to stand in for.
        weigher (LossWeigher): Weights and scores of the batch.
        scored (bool): Whether this loss is part of the samples' scores. Defaults to False.
        title (str): The loss's name for messages.
    """

    #: Whether the losses of all samples come from one evaluation.
    vectorised = True
    #: Whether the loss is a sum over samples once its normaliser is held.
    separable = True

    def __init__(
        self, owner: nn.Module, attribute: str, weigher: LossWeigher, scored: bool = False, title: str = ""
    ) -> None:
        self.owner = owner
        self.attribute = attribute
        self.weigher = weigher
        self.scored = scored
        self.title = title or f"{type(owner).__name__}.{attribute}"
        self.host: Callable = getattr(owner, attribute)
        self._replaced = attribute in vars(owner)
        self._inside = self._retired = False

    def attach(self) -> None:
        """Take the host's place."""
        setattr(self.owner, self.attribute, self)

    @property
    def place(self) -> tuple[int, str]:
        """What tells places in a model apart."""
        return id(self.owner), self.attribute

    @property
    def in_place(self) -> bool:
        """Whether the view stands where it was put, and nobody has put something else there."""
        return vars(self.owner).get(self.attribute) is self

    def restore(self) -> None:
        """Give the host its place back, unless something else stands there by now: that may still call the view."""
        self._retired = True
        if not self.in_place:
            return
        if self._replaced:
            setattr(self.owner, self.attribute, self.host)
        else:
            delattr(self.owner, self.attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A view that calls its own module means the host.
        if self._inside or self._retired or not self.weigher.active:
            return self.host(*args, **kwargs)
        if self.scored and not asks_for_elements(args, kwargs):
            watch_outputs(self.weigher, (args, kwargs))
        self._inside = True
        try:
            result = self.weighed(*args, **kwargs)
        finally:
            self._inside = False
        if self.scored and not asks_for_elements(args, kwargs):
            self.weigher.batch.met = True
        return result

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        """What the host gets in place of its own result; called while a batch is in hand."""
        raise NotImplementedError

    # Copies of the model (an EMA model, a pickled one) get the host's own method back: they are not part
    # of this run.
    def __deepcopy__(self, memo: dict) -> Callable:
        if self._replaced:
            return copy.deepcopy(self.host, memo)
        return getattr(type(self.owner), self.attribute).__get__(copy.deepcopy(self.owner, memo))

    def __reduce__(self) -> tuple:
        if self._replaced:
            return _identity, (self.host,)
        return _method_of, (self.owner, self.attribute)


def asks_for_elements(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a loss is called for its elements: pixel samplers choose pixels by them, nothing is optimised."""
    given = (*args, kwargs.get("reduction_override"), kwargs.get("reduction"))
    return any(isinstance(value, str) and value == "none" for value in given)


def _identity(host: Callable) -> Callable:
    return host


def _method_of(owner: nn.Module, attribute: str) -> Callable:
    return getattr(type(owner), attribute).__get__(owner)
