"""Views: what stands between a host's loss and the host, for the length of one run.

A view takes the place of one attribute of a module (a loss's ``forward``, a head's ``loss_by_feat``), calls
what it replaced, and gives the host the same value with a weighted gradient. There are two kinds: those
that take the loss of every sample from one evaluation, and :class:`SamplewiseView`, which evaluates the
host's own loss on each sample alone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import rng
from .batch import BatchedArguments, like, stack_scalars
from .coverage import check_coverage
from .weigher import LossWeigher

#: Where users find out what to do about a loss that cannot be weighed.
HOW_TO = "write a view for it (see 'Heads and losses of your own' in docs/losses.md)"


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
        # Pixel samplers ask for elementwise losses to choose pixels by: those are not optimised.
        if "none" in (kwargs.get("reduction_override"), kwargs.get("reduction")):
            return self.host(*args, **kwargs)
        losses = self.function(self.owner, *args, **kwargs)
        if self.scored:
            self.weigher.score(self.scale * losses.sums.detach() / losses.counts, losses.counts > 0)
        value = losses.sums.sum() / losses.normaliser if losses.value is None else losses.value
        return self.weigher.weigh(losses.sums, value, losses.normaliser)


class SamplewiseView(LossView):
    """Evaluates the host's own loss on each sample alone: for losses that nobody wrote a view of.

    Where a loss separates over samples, the host's own evaluation is optimised, with the gradient of each
    sample's predictions multiplied by its weight. Where it does not, that is so in full passes (all weights
    are 1), and in pruned ones the mean of weight_i * l_i is optimised, l_i being the host's loss on sample
    i alone. The host's value is shown in any case, and l_i is the score.

    Args:
        separable (bool): Whether the loss is a sum over samples once its normaliser is held.
        trusted (bool): Whether the host's loss is known to treat the samples alike. Others are put to the
            proof in the first step.
        axes (Mapping, optional): See :class:`BatchedArguments`.
        rows (Callable, optional): ``rows(owner, arguments)`` gives the ``rows`` of :class:`BatchedArguments`.
        valid (Callable, optional): ``valid(owner, arguments)`` tells which samples have something to be
            scored by, shape ``(B,)``, bool. Defaults to all.
    """

    vectorised = False

    def __init__(
        self,
        owner: nn.Module,
        weigher: LossWeigher,
        scored: bool,
        title: str,
        attribute: str = "forward",
        *,
        separable: bool = False,
        trusted: bool = False,
        axes: Mapping[str, int] | None = None,
        rows: Callable[[nn.Module, dict], dict[str, list[int]]] | None = None,
        valid: Callable[[nn.Module, dict], Tensor | None] | None = None,
    ) -> None:
        super().__init__(owner, attribute, weigher, scored, title)
        self.separable = separable
        self._trusted = trusted
        self._axes, self._rows, self._valid = axes, rows, valid
        self._signature = inspect.signature(self.host)

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        batch = self._batched(args, kwargs)
        held = self.separable or not self.weigher.pruned
        before = rng.capture()
        if not self._trusted:
            self._trusted = True
            self._prove(batch, before)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not held):
            alone = self._evaluate_alone(batch)
        # The host comes last: what it remembers of the batch, and what it draws, is as it is without us.
        rng.restore(before)
        if held:
            result = self._call(batch.scaled(self._scale))
        else:
            with torch.no_grad():
                result = self._call(batch.arguments)
        per_sample = self._per_sample(result, alone)
        if self.scored:
            self._score(batch, per_sample)
        if held:
            return result
        return _replace_losses(
            result, {path: self.weigher.weigh(losses, _at(result, path), len(losses)) for path, losses in per_sample}
        )

    def _batched(self, args: tuple, kwargs: dict) -> BatchedArguments:
        bound = self._signature.bind(*args, **kwargs).arguments
        rows = None if self._rows is None else self._rows(self.owner, bound)
        batch = BatchedArguments(bound, self.weigher.batch_size, self._axes, rows)
        try:
            if torch.is_grad_enabled():
                batch.check()
            batch.samples()
        except ValueError as error:
            raise ValueError(
                f"{self.title} cannot be weighed: {error}; {HOW_TO}, or train without InfoBatchHook"
            ) from error
        return batch

    def _call(self, arguments: Mapping[str, Any]) -> Any:
        bound = inspect.BoundArguments(self._signature, dict(arguments))  # type: ignore[arg-type]
        return self.host(*bound.args, **bound.kwargs)

    def _scale(self, tensor: Tensor, axis: int, rows: list[int] | None) -> Tensor:
        # Heads may write into their predictions, which a view of a custom function's output forbids.
        return self.weigher.scale_gradient(tensor.clone() if self.attribute != "forward" else tensor, axis, rows)

    def _evaluate_alone(self, batch: BatchedArguments) -> list[dict[tuple, Tensor]]:
        """The losses of each sample alone, by their path in the host's result."""
        alone = []
        for i, arguments in enumerate(batch.samples()):
            try:
                alone.append(dict(_losses(self._call(arguments))))
            except (RuntimeError, IndexError, ValueError, AssertionError, TypeError) as error:
                raise ValueError(
                    f"{self.title} cannot be weighed: it could not be evaluated on sample {i} of the batch alone "
                    f"({type(error).__name__}: {error}); {HOW_TO}, or train without InfoBatchHook"
                ) from error
        return alone

    def _per_sample(self, result: Any, alone: list[dict[tuple, Tensor]]) -> list[tuple[tuple, Tensor]]:
        """Path of each loss in the host's result, and its values on the samples alone, shape ``(B,)``."""
        per_sample = []
        for path, loss in _losses(result):
            if any(path not in losses for losses in alone):
                raise ValueError(
                    f"{self.title} cannot be weighed: it gives {_written(path)} for the batch, but not for each of "
                    f"its samples alone; {HOW_TO}, or train without InfoBatchHook"
                )
            for each in (loss, *(losses[path] for losses in alone)):
                if each.numel() != 1:
                    raise ValueError(
                        f"{self.title} cannot be weighed: expected a scalar for {_written(path)}, got the shape "
                        f"{tuple(each.shape)}; use reduction='mean', or {HOW_TO}"
                    )
            per_sample.append((path, stack_scalars([losses[path] for losses in alone])))
        return per_sample

    def _score(self, batch: BatchedArguments, per_sample: list[tuple[tuple, Tensor]]) -> None:
        if not per_sample:
            return
        scores = sum(losses.detach() for _, losses in per_sample)
        assert isinstance(scores, Tensor)
        valid = None if self._valid is None else self._valid(self.owner, dict(batch.arguments))
        if valid is None:
            valid = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
        self.weigher.score(scores, valid.to(scores.device))

    # ---- proof ------------------------------------------------------------------------------------

    def _prove(self, batch: BatchedArguments, before: dict[str, Any]) -> None:
        """Refuse a loss that tells samples apart by their place in the batch, or leaves some out."""
        if batch.batch_size == 1 or not torch.is_grad_enabled():
            return
        with torch.no_grad():
            total = self._total(self._call(batch.copied()))
            again = self._total(self._call(batch.copied()))
            if total is None or again is None or not torch.isclose(total, again, equal_nan=True, rtol=0, atol=0):
                return  # it draws random numbers: another order of samples is another draw
            rng.restore(before)
            rolled = self._total(self._call(batch.rolled()))
        eps = torch.finfo(total.dtype).eps
        if rolled is None or not torch.isclose(total, rolled, rtol=100 * eps, atol=100 * eps, equal_nan=True):
            raise ValueError(
                f"{self.title} cannot be weighed: its loss is {float(total):.6g}, but "
                f"{'none' if rolled is None else f'{float(rolled):.6g}'} for the same samples in another order; it "
                f"drops, reorders or mixes samples: expected a loss that treats the samples of a batch alike; {HOW_TO}"
            )
        self._check_all_samples_count(batch)
        rng.restore(before)

    def _check_all_samples_count(self, batch: BatchedArguments) -> None:
        predictions = batch.predictions()
        with torch.enable_grad():
            together = self._gradient_norms(self._call(batch.copied()), predictions)
            for i, arguments in enumerate(batch.samples()):
                if float(together[i]) == 0:
                    alone = self._gradient_norms(self._call(arguments), predictions)
                    if float(alone[i]) > 0:
                        raise ValueError(
                            f"{self.title} cannot be weighed: sample {i} of {batch.batch_size} has a loss of its own, "
                            f"but no part in the loss of the batch: expected every sample to count; {HOW_TO}"
                        )

    def _gradient_norms(self, result: Any, predictions: list[tuple[Tensor, int]]) -> Tensor:
        """How much the loss depends on the predictions of each sample, shape ``(B,)``."""
        total = self._total(result)
        norms = torch.zeros(self.weigher.batch_size)
        if total is None or not total.requires_grad:
            return norms
        tensors = [tensor for tensor, _ in predictions]
        gradients = torch.autograd.grad(total, tensors, retain_graph=True, allow_unused=True)
        for gradient, (_, axis) in zip(gradients, predictions, strict=True):
            if gradient is not None:
                norms += gradient.movedim(axis, 0).flatten(1).abs().sum(1).float().cpu()
        return norms

    @staticmethod
    def _total(result: Any) -> Tensor | None:
        losses = [loss.mean() for _, loss in _losses(result)]
        return sum(losses[1:], losses[0]) if losses else None


class ModelView(LossView):
    """Stands in for a model's ``loss``: counts each call as one forward pass, and lets no loss go unweighed."""

    def __init__(self, owner: nn.Module, weigher: LossWeigher) -> None:
        super().__init__(owner, "loss", weigher, scored=False)
        self._checked: set[bool] = set()

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        self.weigher.restart()
        losses = self.host(*args, **kwargs)
        if self.weigher.pruned not in self._checked:
            check_coverage(self.owner, dict(_losses(losses)))
            self._checked.add(self.weigher.pruned)
        return losses


# ---- losses in a host's result ----------------------------------------------------------------------


def _losses(result: Any, path: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    """Path and value of what the host optimises: floating tensors, in dicts those with 'loss' in their key."""
    if isinstance(result, Tensor):
        names = [key for key in path if isinstance(key, str)]
        if result.is_floating_point() and (not names or "loss" in names[-1]):
            yield path, result
    elif isinstance(result, dict):
        for key, value in result.items():
            yield from _losses(value, (*path, key))
    elif isinstance(result, (list, tuple)):
        for i, value in enumerate(result):
            yield from _losses(value, (*path, i))


def _at(result: Any, path: tuple) -> Tensor:
    for key in path:
        result = result[key]
    return result


def _replace_losses(result: Any, losses: Mapping[tuple, Tensor], path: tuple = ()) -> Any:
    if path in losses:
        return losses[path]
    if isinstance(result, dict):
        return type(result)({key: _replace_losses(value, losses, (*path, key)) for key, value in result.items()})
    if isinstance(result, (list, tuple)):
        return like(result, [_replace_losses(value, losses, (*path, i)) for i, value in enumerate(result)])
    return result


def _written(path: tuple) -> str:
    return ".".join(str(key) for key in path) or "its loss"


def _identity(host: Callable) -> Callable:
    return host


def _method_of(owner: nn.Module, attribute: str) -> Callable:
    return getattr(type(owner), attribute).__get__(owner)
