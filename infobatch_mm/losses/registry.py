"""Which view a head or a loss gets: found by class, open to third parties."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .head_rules import BaseHeadRule, FunctionRule, HeadFunction, SamplewiseRule, ViewFactory
from .inseparable import InseparableView
from .reduction import check_said
from .samplewise import ValidOf
from .separable import SeparableView
from .view import LossView
from .views import SampleLosses, VectorisedView
from .weigher import LossWeigher

LossFunction = Callable[..., SampleLosses | tuple[SampleLosses, ...]]

_LOSSES: dict[type, ViewFactory] = {}
_HEADS: dict[type, BaseHeadRule] = {}


def register_loss_view(loss: type[nn.Module]) -> Callable[[LossFunction], LossFunction]:
    """Decorate a function that takes a loss apart by sample in one evaluation: the fast path.

    The function is called as ``function(module, *args, **kwargs)`` with the arguments of the host's call and
    returns :class:`SampleLosses`; inside it, calling ``module`` gives the host's own result. In the first
    step it is compared with the host. It holds for subclasses that do not define a ``forward`` of their own.

    Args:
        loss (type): Class of the loss module.

    Example:
        >>> @register_loss_view(MyLoss)
        ... def my_loss(loss, pred, target, weight=None, ignore_index=255, **kwargs):
        ...     pixels = loss.per_pixel(pred, target, weight)           # (B, H, W)
        ...     counts = (target != ignore_index).flatten(1).sum(1)     # (B,)
        ...     return SampleLosses(pixels.flatten(1).sum(1), normaliser=target.numel(), counts=counts)
    """

    def decorate(function: LossFunction) -> LossFunction:
        register_loss_factory(loss)(view_factory(VectorisedView, function=function))
        return function

    return decorate


def register_separable_loss(
    loss: type[nn.Module],
    valid: ValidOf | None = None,
    *,
    mean_over_valid: bool = False,
) -> None:
    """Promise that a loss is a sum over samples once its normaliser is held.

    It is still evaluated sample by sample for the scores; losses nobody registered are taken as not
    separable. Holds for subclasses that do not define a ``forward`` of their own.

    Args:
        loss (type): Class of the loss module.
        valid (Callable, optional): ``valid(module, arguments)`` tells which samples are scored, see
            :data:`.ValidOf`. Defaults to all.
        mean_over_valid (bool): Whether the normaliser counts the valid elements of the batch, as a mean over pixels
            that are not ignored does, and not all. Defaults to False.
    """
    register_loss_factory(loss)(view_factory(SeparableView, valid=valid, mean_over_valid=mean_over_valid))


def register_samplewise_loss(
    loss: type[nn.Module],
    *,
    reduction: str | None = None,
    valid: ValidOf | None = None,
) -> None:
    """Say that a loss is to be evaluated sample by sample and does not separate, and how it reduces its samples.

    Losses nobody registered are weighed like this too. Holds for subclasses that do not define a ``forward`` of their
    own.

    Args:
        loss (type): Class of the loss module.
        reduction (str, optional): Whether it is a ``'mean'`` or a ``'sum'`` over the samples of the batch: in pruned
            passes the mean, or the sum, of the samples' own losses by weights is optimised. Defaults to None: it is
            found out in the first step, on copies of a sample. Needed where that cannot be seen, as with a loss that
            draws random numbers.
        valid (Callable, optional): As :func:`register_separable_loss` takes it. Defaults to all.

    Raises:
        ValueError: If the reduction is another.
    """
    check_said(reduction)
    register_loss_factory(loss)(view_factory(InseparableView, reduction=reduction, valid=valid))


def register_loss_factory(loss: type[nn.Module], *, replace: bool = True) -> Callable[[ViewFactory], ViewFactory]:
    """Choose the view of a loss module by its settings: decorates a :data:`ViewFactory`.

    Args:
        loss (type): Class of the loss module.
        replace (bool): Whether it takes the place of an earlier registration. Defaults to True.
    """

    def decorate(factory: ViewFactory) -> ViewFactory:
        if replace or loss not in _LOSSES:
            _LOSSES[loss] = factory
        return factory

    return decorate


def register_head_view(head: type[nn.Module], method: str = "loss_by_feat") -> Callable[[HeadFunction], HeadFunction]:
    """Decorate a function that takes a head's losses apart by sample in one evaluation: the fast path.

    The function is called as ``function(head, *args, **kwargs)`` with the arguments of the head's method and
    returns the head's dict, with :class:`SampleLosses` for losses. In the first step it is compared with the
    host. It holds for subclasses that do not define the method themselves.

    Args:
        head (type): Class of the head.
        method (str): The method that computes the losses. Defaults to ``'loss_by_feat'``.
    """

    def decorate(function: HeadFunction) -> HeadFunction:
        register_head_rule(head, FunctionRule(method=method, function=function))
        return function

    return decorate


def register_head_rule(
    head: type[nn.Module], rule: BaseHeadRule | None = None, *, reduction: str | None = None, replace: bool = True
) -> None:
    """Register the rule by which the losses of a head are weighed.

    A rule holds for subclasses that do not define the method themselves. Heads nobody registered are
    evaluated sample by sample at ``loss_by_feat``, which works wherever their predictions have the batch
    first.

    Args:
        head (type): Class of the head.
        rule (BaseHeadRule, optional): A rule of :mod:`.head_rules`, as :func:`.HeadRule` makes them. Defaults to
            sample by sample at ``loss_by_feat``.
        reduction (str, optional): Takes the place of the rule's, in a rule that evaluates sample by sample. Defaults to
            the rule's.
        replace (bool): Whether it takes the place of an earlier registration. Defaults to True.

    Raises:
        ValueError: If the reduction is neither ``'mean'`` nor ``'sum'``.

    Example:
        >>> register_head_rule(MyHead, HeadRule(by_modules=True))     # calls its loss modules with (B, ...) tensors
        >>> register_head_rule(MyQueryHead, HeadRule(axes=dict(all_scores=1)))  # (layers, B, queries, classes)
        >>> register_head_rule(MyRandomHead, reduction="sum")  # a sum over samples, which dropout hides
    """
    check_said(reduction)
    rule = rule or SamplewiseRule()
    if reduction is not None:
        rule = rule.with_reduction(reduction)
    if replace or head not in _HEADS:
        _HEADS[head] = rule


def view_factory(view: Callable[..., LossView], **options: Any) -> ViewFactory:
    """A factory of views of one class.

    Args:
        view (type): Subclass of :class:`LossView`, made as ``view(module, weigher, scored, title, **options)``.
        options: Its options.
    """

    def factory(module: nn.Module, weigher: LossWeigher, scored: bool, title: str) -> LossView:
        return view(module, weigher, scored, title, **options)

    return factory


def samplewise(*, separable: bool = False, **options: Any) -> ViewFactory:
    """A factory of sample-by-sample views.

    Args:
        separable (bool): Whether the loss is a sum over samples once its normaliser is held. Defaults to False.
        options: Of :class:`.SeparableView`, or of :class:`.InseparableView`.
    """
    return view_factory(SeparableView if separable else InseparableView, **options)


def loss_factory(module: nn.Module) -> ViewFactory | None:
    """What was registered for a loss module, or None."""
    return _find(_LOSSES, type(module), lambda factory: {"forward"})


def head_rule(head: nn.Module) -> BaseHeadRule | None:
    """What was registered for a head, or None."""
    return _find(_HEADS, type(head), lambda rule: rule.defined_by)


def _find(registry: Mapping[type, Any], cls: type, methods: Callable[[Any], set[str]]) -> Any:
    """The entry of the nearest registered class, unless one below it has a method of its own in its place."""
    for i, base in enumerate(cls.__mro__):
        if base in registry:
            entry = registry[base]
            return None if any(methods(entry) & vars(below).keys() for below in cls.__mro__[:i]) else entry
    return None
