"""Which view a head or a loss gets: found by class, open to third parties."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .samplewise import SamplewiseView
from .views import LossView, SampleLosses, VectorisedView
from .weigher import LossWeigher

#: Makes the view of a loss module: ``factory(module, weigher, scored, title)``.
ViewFactory = Callable[[nn.Module, LossWeigher, bool, str], LossView]


@dataclass(frozen=True)
class HeadRule:
    """How the losses of a head are weighed.

    Attributes:
        by_modules (bool): The head's losses all come from loss modules (attributes called ``loss*``), which
            it calls with the batch first: these are weighed, not the head.
        method (str): Else the method that computes the losses from predictions.
        separable (bool): Else whether these losses are sums over samples once their normalisers are held.
        trusted (bool): Else whether the head needs no proof that it treats the samples of a batch alike.
        axes, rows, valid: See :class:`SamplewiseView`.
    """

    by_modules: bool = False
    method: str = "loss_by_feat"
    separable: bool = False
    trusted: bool = False
    axes: Mapping[str, int] | None = None
    rows: Callable[[nn.Module, dict], dict[str, list[int]]] | None = None
    valid: Callable[[nn.Module, dict], Tensor | None] | None = None


_LOSSES: dict[type, ViewFactory] = {}
_HEADS: dict[type, HeadRule] = {}


def register_loss_view(
    loss: type[nn.Module],
    *,
    separable: bool | None = None,
    valid: Callable[[nn.Module, dict], Tensor | None] | None = None,
) -> Callable:
    """Say how a loss module's loss is taken apart by sample.

    As a decorator of a function it makes a vectorised view, the fast one. The function is called as
    ``function(module, *args, **kwargs)`` with the arguments of the host's call and returns
    :class:`SampleLosses`; inside it, calling ``module`` gives the host's own result.

    Called with ``separable`` alone it says how the sample-by-sample view treats the loss: ``True`` promises
    that the loss is a sum over samples once its normaliser is held. Losses nobody registered are taken as
    not separable.

    A registration holds for subclasses that do not define a ``forward`` of their own.

    Args:
        loss (type): Class of the loss module.
        separable (bool, optional): See above.
        valid (Callable, optional): With ``separable``: see :class:`SamplewiseView`.

    Example:
        >>> @register_loss_view(MyLoss)
        ... def my_loss(loss, pred, target, ignore_index=255, **kwargs):
        ...     pixels = loss.per_pixel(pred, target)                   # (B, H, W)
        ...     counts = (target != ignore_index).flatten(1).sum(1)     # (B,)
        ...     return SampleLosses(pixels.flatten(1).sum(1), normaliser=target.numel(), counts=counts)
    """

    def decorate(function: Callable[..., SampleLosses]) -> Callable[..., SampleLosses]:
        def factory(module: nn.Module, weigher: LossWeigher, scored: bool, title: str) -> LossView:
            return VectorisedView(module, weigher, scored, title, function)

        _LOSSES[loss] = factory
        return function

    if separable is not None:
        _LOSSES[loss] = samplewise(separable=separable, trusted=True, valid=valid)
    return decorate


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


def register_head_view(head: type[nn.Module], *, replace: bool = True, **rule: Any) -> None:
    """Say how the losses of a head are weighed.

    A registration holds for subclasses that do not define the method of their own. Heads nobody
    registered are evaluated sample by sample at ``loss_by_feat``, which works wherever their predictions have the
    batch first.

    Args:
        head (type): Class of the head.
        replace (bool): Whether it takes the place of an earlier registration. Defaults to True.
        **rule: The fields of :class:`HeadRule`.

    Example:
        >>> register_head_view(MyHead, by_modules=True)        # calls its loss modules with (B, ...) tensors
        >>> register_head_view(MyQueryHead, axes=dict(all_scores=1))   # (layers, B, queries, classes)
    """
    if replace or head not in _HEADS:
        _HEADS[head] = HeadRule(**rule)


def samplewise(**options: Any) -> ViewFactory:
    """A factory of sample-by-sample views with these options of :class:`SamplewiseView`."""

    def factory(module: nn.Module, weigher: LossWeigher, scored: bool, title: str) -> LossView:
        return SamplewiseView(module, weigher, scored, title, **options)

    return factory


def loss_factory(module: nn.Module) -> ViewFactory | None:
    """What was registered for a loss module, or None."""
    return _find(_LOSSES, type(module), "forward")


def head_rule(head: nn.Module) -> HeadRule | None:
    """What was registered for a head, or None."""
    return _find(_HEADS, type(head), "loss_by_feat")


def _find(registry: Mapping[type, Any], cls: type, method: str) -> Any:
    for base in cls.__mro__:
        if base in registry:
            return registry[base]
        if method in vars(base):
            return None  # a method of its own: what is known of its parents does not hold
    return None
