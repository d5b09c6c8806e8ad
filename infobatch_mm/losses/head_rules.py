"""The three ways to weigh the losses of a head, a class each: a rule makes the views of a head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .inseparable import InseparableView
from .reduction import check_said
from .samplewise import RowsOf, ValidOf
from .separable import SeparableView
from .view import LossView
from .views import OrderView, VectorisedView
from .weigher import LossWeigher

#: Makes the view of a loss module: ``factory(module, weigher, scored, title)``.
ViewFactory = Callable[[nn.Module, LossWeigher, bool, str], LossView]
#: Takes the losses of a head apart by sample: see :func:`.register_head_view`.
HeadFunction = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class HeadInModel:
    """A head, as its host presents it to a rule.

    Attributes:
        module (nn.Module): The head.
        title (str): Its name for messages.
        weigher (LossWeigher): Weights and scores of the batch.
        scored (bool): Whether its losses count in the score.
        valid (Callable, optional): Which samples have something to be scored by, where the rule says nothing, see
            :data:`.ValidOf`.
        module_views (Callable): ``module_views(default)`` makes the views of its loss modules, with a view of the
            default factory for a module that nobody registered; None for the host's default.
    """

    module: nn.Module
    title: str
    weigher: LossWeigher
    scored: bool
    valid: ValidOf | None
    module_views: Callable[[ViewFactory | None], Iterator[LossView]]


@dataclass(frozen=True, kw_only=True)
class BaseHeadRule(ABC):
    """How the losses of a head are weighed.

    Attributes:
        method (str): The method that computes the losses from predictions. Defaults to ``'loss_by_feat'``.
        overrides (tuple): Other methods that a subclass must leave as they are for the rule to hold for it. Defaults to
            none.
    """

    method: str = "loss_by_feat"
    overrides: tuple[str, ...] = ()

    @property
    def defined_by(self) -> set[str]:
        """The methods that a subclass of the head must leave as they are for the rule to hold for it."""
        return {"loss_by_feat", "loss_and_target", self.method, *self.overrides}

    def with_reduction(self, reduction: str) -> BaseHeadRule:
        """The same rule with another reduction; without effect where losses are not evaluated sample by sample."""
        return self

    @abstractmethod
    def views(self, head: HeadInModel) -> Iterator[LossView]:
        """The views that weigh the losses of a head, not attached yet."""


@dataclass(frozen=True, kw_only=True)
class ModulesRule(BaseHeadRule):
    """The head's losses all come from loss modules, which are weighed, and not the head.

    Loss modules are at its attributes called ``loss*``. It calls them with the batch first.

    Attributes:
        view (Callable): What stands in for the method: ``view(head, method, weigher, title=...)``. Defaults to a view
            that only checks the order of the samples.
        default_loss (Callable, optional): Makes the view of a loss module that nobody registered. Defaults to the
            host's.
    """

    view: Callable[..., LossView] = OrderView
    default_loss: ViewFactory | None = None

    def views(self, head: HeadInModel) -> Iterator[LossView]:
        yield self.view(head.module, self.method, head.weigher, title=head.title)
        yield from head.module_views(self.default_loss)


@dataclass(frozen=True, kw_only=True)
class SamplewiseRule(BaseHeadRule):
    """The head's losses are evaluated on each sample of the batch alone.

    Attributes:
        separable (bool): Whether they are sums over samples once their normalisers are held. Defaults to False.
        trusted (bool): Whether to skip the first-step proof that the head treats the samples of a batch alike. Defaults
            to False.
        apart (bool): Whether to refuse a loss that compares the samples of a batch with one another. Defaults to
            False.
        reduction (str, optional): Whether losses that are not separable are a ``'mean'`` or a ``'sum'`` over the
            samples of the batch. Defaults to None: it is found out in the first step. Needed where that cannot be
            seen, as with losses that draw random numbers.
        axes, rows, valid: See :class:`.SamplewiseView`.

    Raises:
        ValueError: If the reduction is another.
    """

    separable: bool = False
    trusted: bool = False
    apart: bool = False
    reduction: str | None = None
    axes: Mapping[str, int | None] | None = None
    rows: RowsOf | None = None
    valid: ValidOf | None = None

    def __post_init__(self) -> None:
        check_said(self.reduction)

    def with_reduction(self, reduction: str) -> SamplewiseRule:
        return replace(self, reduction=reduction)

    def views(self, head: HeadInModel) -> Iterator[LossView]:
        given = head.module, head.weigher, head.scored, head.title, self.method
        options: dict[str, Any] = dict(
            trusted=self.trusted, apart=self.apart, axes=self.axes, rows=self.rows, valid=self.valid or head.valid
        )
        if self.separable:
            yield SeparableView(*given, **options)
        else:
            yield InseparableView(*given, reduction=self.reduction, **options)


@dataclass(frozen=True, kw_only=True)
class FunctionRule(BaseHeadRule):
    """A function takes the head's losses apart by sample in one evaluation.

    Attributes:
        function (Callable): See :func:`.register_head_view`.
    """

    function: HeadFunction

    def views(self, head: HeadInModel) -> Iterator[LossView]:
        yield VectorisedView(head.module, head.weigher, head.scored, head.title, self.function, self.method)


def HeadRule(
    by_modules: bool = False,
    method: str = "loss_by_feat",
    overrides: tuple[str, ...] = (),
    view: Callable[..., LossView] = OrderView,
    separable: bool = False,
    trusted: bool = False,
    apart: bool = False,
    reduction: str | None = None,
    axes: Mapping[str, int | None] | None = None,
    rows: RowsOf | None = None,
    valid: ValidOf | None = None,
    function: HeadFunction | None = None,
) -> BaseHeadRule:
    """The rule of a head in a single spelling: which of the three it is follows from the arguments.

    Arguments that this rule has no use for are not looked at.

    Args:
        by_modules (bool): Whether to weigh the head's loss modules: a :class:`ModulesRule`. Defaults to
            False.
        function (Callable, optional): Else, if it is given, makes a :class:`FunctionRule`.
        method, overrides, view, separable, trusted, apart, reduction, axes, rows, valid: See the rules; by default, a
            :class:`SamplewiseRule`.

    Returns:
        BaseHeadRule: For :func:`.register_head_rule`.

    Raises:
        ValueError: If the reduction is neither ``'mean'`` nor ``'sum'``.
    """
    check_said(reduction)
    if by_modules:
        return ModulesRule(method=method, overrides=overrides, view=view)
    if function is not None:
        return FunctionRule(method=method, overrides=overrides, function=function)
    return SamplewiseRule(
        method=method,
        overrides=overrides,
        separable=separable,
        trusted=trusted,
        apart=apart,
        reduction=reduction,
        axes=axes,
        rows=rows,
        valid=valid,
    )
