"""The universal view: a host's own loss, evaluated on each sample of the batch alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core import rng
from .batch import BatchedArguments, stack_scalars
from .proof import check_order, prove_samples_alike
from .results import loss_at, losses_in, replace_losses, written
from .views import LossView, asks_for_elements
from .weigher import HOW_TO, LossWeigher

# A blank sample's own loss is taken as sound up to this multiple of the batch's.
_SOUND = 1000.0


class SamplewiseView(LossView):
    """Evaluates the host's own loss on each sample alone: for losses that nobody wrote a view of.

    Where a loss separates over samples, the host's own evaluation is optimised, with the gradient of each
    sample's predictions multiplied by its weight. Where it does not, that is so in full passes (all weights
    are 1), and in pruned ones the mean of weight_i * l_i is optimised, l_i being the host's loss on sample
    i alone. The host's value is shown in any case, and l_i is the score.

    Args:
        separable (bool): Whether the loss is a sum over samples once its normaliser is held.
        trusted (bool): Whether the host's loss is known to treat the samples alike, and not to write into
            its predictions. Others are put to the proof in the first step.
        axes (Mapping, optional): See :class:`BatchedArguments`.
        rows (Callable, optional): ``rows(owner, arguments)`` gives the ``rows`` of :class:`BatchedArguments`.
        valid (Callable, optional): ``valid(owner, arguments)`` tells which samples have something to be
            scored by, shape ``(B,)``, bool, or None for all. Defaults to all.
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
        self._proven = trusted
        # Heads may write into their predictions: only losses that are known not to get the originals.
        self._writable = not trusted or attribute != "forward"
        self._axes, self._rows, self._valid = axes, rows, valid
        self._signature = inspect.signature(self.host)

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        if asks_for_elements(kwargs):
            return self.host(*args, **kwargs)
        batch = self._batched(args, kwargs)
        valid = None if self._valid is None else self._valid(self.owner, dict(batch.arguments))
        held = self.separable or not self.weigher.pruned
        before = rng.capture()
        proven = self._proven
        if not proven and torch.is_grad_enabled():
            self._proven = prove_samples_alike(self._call, batch, self.title)
            rng.restore(before)
        alone = None
        if self.scored or not held or not proven:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not held):
                alone = self._evaluate_alone(batch)
        # The host comes last: what it remembers of the batch, and what it draws, is as it is without us.
        rng.restore(before)
        result = self._evaluate_host(batch, held)
        if alone is None:
            return result
        per_sample = self._per_sample(result, alone, valid)
        if self.scored:
            self._score(per_sample, valid)
        if held:
            return result
        weigh = self.weigher.weigh
        return replace_losses(
            result,
            {
                path: weigh(losses, loss_at(result, path), len(losses), self.title)
                for path, losses in per_sample.items()
            },
        )

    def _batched(self, args: tuple, kwargs: dict) -> BatchedArguments:
        bound = self._signature.bind(*args, **kwargs).arguments
        check_order(self.title, self.weigher.data_samples, bound.values())
        rows = None if self._rows is None else self._rows(self.owner, bound)
        batch = BatchedArguments(bound, self.weigher.batch_size, self._axes, rows, self._writable)
        try:
            if torch.is_grad_enabled():
                batch.check()
            batch.samples()
        except ValueError as error:
            raise ValueError(f"{self.title} cannot be weighed: {error}; {HOW_TO}") from error
        return batch

    def _call(self, arguments: Mapping[str, Any]) -> Any:
        bound = inspect.BoundArguments(self._signature, dict(arguments))  # type: ignore[arg-type]
        return self.host(*bound.args, **bound.kwargs)

    def _evaluate_host(self, batch: BatchedArguments, held: bool) -> Any:
        """The host's own evaluation of the batch, for its gradient or only for its value."""
        if not held:
            with torch.no_grad():
                if not self._writable:
                    return self._call(batch.arguments)
                return self._call(batch.mapped(lambda tensor, axis, rows: tensor.detach().clone()))

        def scaled(tensor: Tensor, axis: int, rows: list[int] | None) -> Tensor:
            tensor = self.weigher.scale_gradient(tensor, axis, rows)
            return tensor.clone() if self._writable else tensor

        result = self._call(batch.mapped(scaled))
        if self.separable:
            return result
        # A full pass: all weights are 1, whatever way a loss takes to a parameter.
        return replace_losses(result, {path: self.weigher.mark(loss) for path, loss in losses_in(result)})

    def _evaluate_alone(self, batch: BatchedArguments) -> list[dict[tuple, Tensor]]:
        """The losses of each sample alone, by their path in the host's result."""
        alone = []
        for i, arguments in enumerate(batch.samples()):
            try:
                alone.append(dict(losses_in(self._call(arguments))))
            except (RuntimeError, IndexError, ValueError, AssertionError, TypeError) as error:
                raise ValueError(
                    f"{self.title} cannot be weighed: it could not be evaluated on sample {i} of the batch alone "
                    f"({type(error).__name__}: {error}); {HOW_TO}"
                ) from error
        return alone

    def _per_sample(self, result: Any, alone: list[dict[tuple, Tensor]], valid: Tensor | None) -> dict[tuple, Tensor]:
        """Path of each loss in the host's result, and its values on the samples alone, shape ``(B,)``."""
        per_sample = {}
        for path, loss in losses_in(result):
            if any(path not in losses for losses in alone):
                raise ValueError(
                    f"{self.title} cannot be weighed: it gives {written(path)} for the batch, but not for each of "
                    f"its samples alone; {HOW_TO}"
                )
            values = [losses[path] for losses in alone]
            for each in (loss, *values):
                if each.numel() > 1:
                    raise ValueError(
                        f"{self.title} cannot be weighed: expected a scalar for {written(path)}, got the shape "
                        f"{tuple(each.shape)}; use reduction='mean', or {HOW_TO}"
                    )
            if loss.numel():  # an empty one says that nothing was there to train on
                per_sample[path] = _without_blanks([value.sum() for value in values], loss, valid)
        return per_sample

    def _score(self, per_sample: dict[tuple, Tensor], valid: Tensor | None) -> None:
        scores = [losses.detach() for losses in per_sample.values()]
        if not scores:
            return
        total = torch.stack(scores).sum(0)
        if valid is None:
            valid = torch.ones(len(total), dtype=torch.bool)
        self.weigher.score(total, valid.to(total.device))


def _without_blanks(values: list[Tensor], host_loss: Tensor, valid: Tensor | None) -> Tensor:
    """One tensor of the samples' losses, shape ``(B,)``, with 0 where a blank sample is divided by nothing.

    Alone, a sample without a valid pixel or a box may give 0/0, or a loss over an epsilon, where the host's
    loss of the whole batch is sound: it would spoil the gradient of all.
    """
    losses = stack_scalars(values)
    if valid is None or not losses.requires_grad:
        return losses
    sound = losses.detach().abs() <= _SOUND * host_loss.detach().abs().sum()
    usable = sound | valid.to(losses.device)
    if bool(usable.all()):
        return losses
    kept = zip(values, usable.tolist(), strict=True)
    return stack_scalars([value if keep else torch.zeros_like(value) for value, keep in kept])
