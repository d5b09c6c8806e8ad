"""The views of models, and of heads and losses whose values by sample come from one evaluation.

``samplewise.py`` has the view that works for any loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import rng
from .dissect.coverage import Coverage
from .dissect.memory import Memory
from .dissect.proof import check_order
from .dissect.results import losses_in, replace_losses, written
from .refusals import HOW_TO
from .view import LossView, asks_for_elements
from .weigher import LossWeigher


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
        floor (Callable, optional): Gives the smallest sum that each sample's target allows, shape ``(B,)``. Those of
            mixed images differ: where images are mixed it is no part of the score.
        mean_over_valid (bool): Whether the normaliser counts the valid elements of the batch, or adds up what depends
            on them, and not all elements: samples without a valid one change it then, see
            :meth:`.LossWeigher.begin`. Defaults to False.
    """

    sums: Tensor
    normaliser: Tensor | float
    counts: Tensor
    value: Tensor | None = None
    floor: Callable[[], Tensor] | None = None
    mean_over_valid: bool = False

    def shown(self) -> Tensor:
        """The loss that the host shows."""
        return self.sums.sum() / self.normaliser if self.value is None else self.value


class VectorisedView(LossView):
    """Takes the losses of all samples from one evaluation of a function.

    Args:
        function (Callable): Called as ``function(module, *args, **kwargs)`` with the arguments of the
            host's call, returns :class:`SampleLosses`, or a dict or tuple of them as a head returns its losses.
            A call of the module inside it is the host's.
        attribute (str): The method to stand in for. Defaults to ``'forward'``.
        scaled_by (nn.Module, optional): Module whose ``loss_weight`` the host multiplies the result by.
        trusted (bool): Whether the function is known to compute the host's loss. Others are compared with
            the host in the first step.
    """

    def __init__(
        self,
        owner: nn.Module,
        weigher: LossWeigher,
        scored: bool,
        title: str,
        function: Callable[..., SampleLosses | dict[str, Any] | tuple],
        attribute: str = "forward",
        *,
        scaled_by: nn.Module | None = None,
        trusted: bool = False,
    ) -> None:
        super().__init__(owner, attribute, weigher, scored, title)
        self.function = function
        self._scaled_by = scaled_by
        self._trusted = trusted

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        if asks_for_elements(args, kwargs):
            return self.host(*args, **kwargs)
        if not self._trusted:
            self._compare(args, kwargs)
            self._trusted = True
        result = self.function(self.owner, *args, **kwargs)
        return replace_losses(result, {path: self._weigh(losses) for path, losses in _taken_apart(result)})

    def _weigh(self, losses: SampleLosses) -> Tensor:
        if self.scored:
            sums = losses.sums.detach()
            if losses.floor is not None and self.weigher.mixes:
                sums = sums - losses.floor()
            if self._scaled_by is not None:
                weight = self._scaled_by.loss_weight
                sums = (weight.detach() if isinstance(weight, Tensor) else weight) * sums
            self.weigher.score(sums / losses.counts, losses.counts > 0)
        return self.weigher.weigh(
            losses.sums, losses.shown(), losses.normaliser, self.title, mean_over_valid=losses.mean_over_valid
        )

    def _compare(self, args: tuple, kwargs: dict) -> None:
        """Refuse a function that computes something else than the host does."""
        generators = rng.capture()
        memory = Memory(self.owner)
        with torch.no_grad():
            with memory.aside():
                host = dict(losses_in(self.host(*args, **kwargs)))
            rng.restore(generators)
            with memory.aside():
                result = self.function(self.owner, *args, **kwargs)
            rng.restore(generators)
        ours = dict(_taken_apart(result))
        added = [written(path) for path in ours if path not in host]
        if added:
            raise ValueError(f"the view of {self.title} gives {', '.join(added)}, which the host does not")
        for path, loss in host.items():
            losses = ours.get(path)
            if losses is None:
                raise ValueError(f"the view of {self.title} gives no SampleLosses for {written(path)}")
            value, expected = float(losses.shown()), float(loss.mean())
            if abs(value - expected) > 1e-3 * max(abs(expected), abs(value)):
                raise ValueError(
                    f"the view of {self.title} gives {value:.6g} for {written(path)}, the host {expected:.6g}: its "
                    "sums divided by its normaliser must be the host's loss"
                )


def _taken_apart(result: Any, path: tuple = ()) -> Iterator[tuple[tuple, SampleLosses]]:
    """Path, as those of :func:`losses_in`, and value of each loss in what a view's function returns."""
    if isinstance(result, SampleLosses):
        yield path, result
    elif isinstance(result, (dict, tuple)):
        for key, value in result.items() if isinstance(result, dict) else enumerate(result):
            yield from _taken_apart(value, (*path, key))


class RowwiseView(LossView):
    """For losses that return a value, or elements, of each sample: shape ``(B, ...)``.

    Whether the head adds them up or averages them, the gradient that comes back to each row is multiplied by its
    weight.
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
            self.weigher.score(scores)
        return self.weigher.weigh_rows(losses)


class OrderView(LossView):
    """Stands in for a ``loss_by_feat`` whose loss modules are weighed: checks the order of its samples."""

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        check_order(self.title, self.weigher.data_samples, (*args, *kwargs.values()))
        return self.host(*args, **kwargs)


class ModelView(LossView):
    """Stands in for a model's ``loss``: counts each call in training as one forward pass.

    Args:
        coverage (Coverage): Checks the losses that the model returns.
        labelled (Callable, optional): ``labelled(model, data_samples)`` tells which samples have a label,
            shape ``(B,)``, bool, or None where that is not known. The others are not scored.
    """

    def __init__(
        self,
        owner: nn.Module,
        weigher: LossWeigher,
        coverage: Coverage,
        labelled: Callable[[nn.Module, Sequence[Any]], Tensor | None] | None = None,
    ) -> None:
        super().__init__(owner, "loss", weigher, scored=False)
        self._coverage = coverage
        self._labelled = labelled

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        if not self.owner.training:  # somebody evaluates another batch between our steps
            with self.weigher.suspended():
                return self.host(*args, **kwargs)
        self.weigher.restart()
        self.weigher.reached = True
        for value in (*args, *kwargs.values()):
            if isinstance(value, (list, tuple)) and len(value) == self.weigher.batch_size:
                self.weigher.data_samples = value
                if self._labelled is not None:
                    self.weigher.labelled = self._labelled(self.owner, value)
        losses = self.host(*args, **kwargs)
        self._coverage.check(dict(losses_in(losses)), self.weigher.pruned)
        return losses


class ParsedLossesView(LossView):
    """Stands in for a model's ``parse_losses``: what it is given, and what it makes of it, is what is optimised."""

    def __init__(self, owner: nn.Module, weigher: LossWeigher, coverage: Coverage) -> None:
        super().__init__(owner, "parse_losses", weigher, scored=False)
        self._coverage = coverage

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        if not self.owner.training:  # somebody evaluates another batch, or trains on the host's losses, see end()
            result = self.host(*args, **kwargs)
            if any(loss.requires_grad for _, loss in losses_in(result)):
                self.weigher.evaluated = type(self.owner).__name__
            return result
        for value in (*args, *kwargs.values()):
            self._coverage.check(dict(losses_in(value)), self.weigher.pruned, parsed=True)
        result = self.host(*args, **kwargs)
        total = result[0] if isinstance(result, tuple) else result
        if isinstance(total, Tensor):
            self._coverage.check({("the total of parse_losses",): total}, self.weigher.pruned, parsed=True)
        return result


def model_views(
    model: nn.Module,
    weigher: LossWeigher,
    labelled: Callable[[nn.Module, Sequence[Any]], Tensor | None] | None = None,
) -> list[LossView]:
    """The views of a model itself, beside those of its heads; see :class:`ModelView`."""
    coverage = Coverage(model)
    return [ModelView(model, weigher, coverage, labelled), ParsedLossesView(model, weigher, coverage)]
