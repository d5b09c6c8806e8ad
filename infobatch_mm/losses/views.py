"""The views of heads and losses whose values by sample come from one evaluation.

:mod:`.samplewise` has the view that works for any loss, :mod:`.model_views` what stands in for a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import rng
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
        value (Tensor, optional): The host's own value, where it can be had to the bit. Defaults to the sums over the
            normaliser.
        floor (Callable, optional): Gives the smallest sum that each sample's target allows, shape ``(B,)``. It differs
            from one mixed image to the other: where images are mixed it is no part of the score.
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
        scaled_by (nn.Module, optional): Module whose ``loss_weight`` the host multiplies the result by. Defaults to
            none.
        trusted (bool): Whether the function is known to compute the host's loss. Others are compared with
            the host in the first step. Defaults to False.
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
    """Path, as :func:`losses_in` writes it, and value of each loss in what a view's function returns."""
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
        check_order(self.title, self.weigher.batch.rows.data_samples, (*args, *kwargs.values()))
        return self.host(*args, **kwargs)
