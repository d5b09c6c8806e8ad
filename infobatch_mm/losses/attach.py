"""Attaching views to the heads of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from .head_rules import BaseHeadRule, HeadInModel, ViewFactory
from .refusals import HOW_TO
from .registry import head_rule, loss_factory, samplewise
from .samplewise import ValidOf
from .view import LossView
from .weigher import LossWeigher


class AttachedViews:
    """The views of one model, in place until :meth:`restore`.

    Args:
        make (Callable): Makes the views of the model as it is now.

    Raises:
        ValueError: If one of them would stand in for another run's view; nothing is attached then.
    """

    def __init__(self, make: Callable[[], list[LossView]]) -> None:
        self._make = make
        self._views: list[LossView] = []
        self._attach()

    def _attach(self) -> None:
        views = _one_for_each_place(self._make())
        for view in views:
            if isinstance(view.host, LossView):
                raise ValueError(f"{view.title} is weighed by another hook already: keep one InfoBatchHook per model")
        for view in views:
            view.attach()
        self._views = views

    @property
    def vectorised(self) -> bool:
        """Whether every loss comes from one evaluation: the fast path."""
        return all(view.vectorised for view in self._views)

    @property
    def not_separable(self) -> list[str]:
        """Names of losses that do not separate over samples: in pruned passes each sample's own is optimised."""
        return [view.title for view in self._views if not view.separable]

    @property
    def in_place(self) -> bool:
        """Whether all views stand where they were put."""
        return all(view.in_place for view in self._views)

    def renew(self) -> bool:
        """Attach again if the host has exchanged a loss or a batch augmentation since; returns whether it has."""
        wanted = {view.place for view in self._make()}
        if self.in_place and wanted == {view.place for view in self._views}:
            return False
        self.restore()
        self._attach()
        return True

    def restore(self) -> None:
        """Give the model back to the host; a second call does nothing."""
        while self._views:
            self._views.pop().restore()


def _one_for_each_place(views: list[LossView]) -> list[LossView]:
    """A loss module that heads share has one view, which scores if it does for any of them."""
    places: dict[tuple[int, str], LossView] = {}
    for view in views:
        first = places.setdefault(view.place, view)
        first.scored = first.scored or view.scored
    return list(places.values())


def head_views(
    name: str,
    head: nn.Module,
    weigher: LossWeigher,
    scored: bool,
    default: BaseHeadRule,
    default_loss: ViewFactory | None = None,
    valid: ValidOf | None = None,
) -> Iterator[LossView]:
    """The views of one head.

    Args:
        name (str): The head's name in its model, for messages.
        head (nn.Module): The head.
        weigher (LossWeigher): Weights and scores of the batch.
        scored (bool): Whether the head counts in the score.
        default (BaseHeadRule): The rule of a head that nobody registered.
        default_loss (ViewFactory, optional): Makes the view of a loss module that nobody registered. Defaults to sample
            by sample.
        valid (Callable, optional): Which samples have something to be scored by, where the rule of a head that is
            evaluated sample by sample says nothing; see :data:`.ValidOf`. Defaults to all.

    Yields:
        LossView: Not attached yet.

    Raises:
        ValueError: If the head has no losses to weigh.
    """
    title = f"{name} ({type(head).__name__})"
    rule = head_rule(head) or default
    if not callable(getattr(head, rule.method, None)):
        raise ValueError(
            f"{title} has no {rule.method}(): its losses cannot be weighed; name the method that computes them with "
            f"register_head_rule(..., HeadRule(method=...)), or {HOW_TO}"
        )

    def views_of_modules(default: ViewFactory | None) -> Iterator[LossView]:
        return module_views(name, head, weigher, scored, default or default_loss)

    yield from rule.views(HeadInModel(head, title, weigher, scored, valid, views_of_modules))


def module_views(
    name: str, head: nn.Module, weigher: LossWeigher, scored: bool, default_loss: ViewFactory | None = None
) -> Iterator[LossView]:
    """The views of a head's loss modules alone; arguments as :func:`head_views` takes them."""
    for attribute, module in _loss_modules(head):
        factory = loss_factory(module) or default_loss or samplewise()
        # The host trains on what has "loss" in its name and only displays the rest.
        counts = scored and "loss" in getattr(module, "loss_name", "loss")
        loss = f"{name}.{attribute} ({type(module).__name__} of {type(head).__name__})"
        yield factory(module, weigher, counts, loss)


def _loss_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules at the attributes called ``loss*``, of the head and of heads inside it."""
    for name, child in module.named_children():
        if not name.startswith("loss"):
            yield from _loss_modules(child, f"{prefix}{name}.")
        elif isinstance(child, nn.ModuleList):
            yield from ((f"{prefix}{name}.{i}", each) for i, each in enumerate(child))
        else:
            yield prefix + name, child
