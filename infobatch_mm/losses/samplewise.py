"""The universal view: a host's own loss, evaluated on each sample of the batch alone.

:mod:`.separable` and :mod:`.inseparable` say what is optimised then.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core import rng
from .dissect.arguments import BatchedArguments, stack_scalars
from .dissect.memory import Memory
from .dissect.proof import check_order, prove_samples_alike
from .dissect.results import losses_in, written
from .refusals import HOW_TO, cannot_be_weighed
from .sound import Unguarded
from .view import LossView, asks_for_elements
from .weigher import LossWeigher

#: ``rows(owner, arguments)``: parameter name to the numbers of consecutive rows of the samples.
RowsOf = Callable[[nn.Module, dict], dict[str, list[int]]]
#: ``valid(owner, arguments)``: which samples have something to be scored by, shape ``(B,)``, bool, or None for all.
ValidOf = Callable[[nn.Module, dict], Tensor | None]

_UNGUARDED = Unguarded()


@dataclass(frozen=True)
class Call:
    """One call of the host's loss.

    Attributes:
        batch (BatchedArguments): Its arguments.
        valid (Tensor, optional): Which samples have something to be scored by, shape ``(B,)``, bool; None where nobody
            knows.
        reset (Callable): Puts random generators back to where the call found them.
    """

    batch: BatchedArguments
    valid: Tensor | None
    reset: Callable[[], None]


class SamplewiseView(LossView):
    """Evaluates the host's own loss on each sample alone: for losses that nobody wrote a view of.

    The host's loss on sample i alone, l_i, is the score of the sample. The host's value is shown in full passes, in
    pruned ones what is comparable with it (:mod:`.logged`).

    Args:
        trusted (bool): Whether the host's loss is known to treat the samples alike, and not to write into
            its predictions. Others are put to the proof in the first step. Defaults to False.
        apart (bool): Whether to refuse, in the first step, a loss that compares the samples of a batch with one
            another: in a contrastive one no sample has a loss of its own. Defaults to False.
        axes (Mapping, optional): See :class:`BatchedArguments`.
        rows (Callable, optional): See :data:`RowsOf`. Defaults to no rows.
        valid (Callable, optional): See :data:`ValidOf`. Defaults to all.
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
        trusted: bool = False,
        apart: bool = False,
        axes: Mapping[str, int | None] | None = None,
        rows: RowsOf | None = None,
        valid: ValidOf | None = None,
    ) -> None:
        super().__init__(owner, attribute, weigher, scored, title)
        self._trusted = trusted
        self._apart = apart
        self._axes, self._rows, self._valid = axes, rows, valid
        self._met = False
        self._memory = Memory(owner)
        self._signature = inspect.signature(self.host)

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        if asks_for_elements(args, kwargs):
            return self.host(*args, **kwargs)
        batch = self._batched(args, kwargs)
        valid = None if self._valid is None else self._valid(self.owner, dict(batch.arguments))
        call = Call(batch, valid, partial(rng.restore, rng.capture()))
        if not self._met and torch.is_grad_enabled():
            self._meet(call)
            call.reset()
        return self._weighed(call)

    def _weighed(self, call: Call) -> Any:
        """What the host gets in place of its own result.

        The host's own evaluation comes last, after ``call.reset()``: what it remembers of the batch, and what it draws,
        is as it is without us.
        """
        raise NotImplementedError

    def _learn(self, call: Call, alone: list[dict[tuple, Tensor]]) -> None:
        """Learn what is still to be known of the loss, from its values on the samples alone."""

    def _batched(self, args: tuple, kwargs: dict) -> BatchedArguments:
        bound = self._signature.bind(*args, **kwargs).arguments
        check_order(self.title, self.weigher.batch.rows.data_samples, bound.values())
        rows = None if self._rows is None else self._rows(self.owner, bound)
        return BatchedArguments(bound, self.weigher.batch_size, self._axes, rows, self._writable)

    @property
    def _writable(self) -> bool:
        """Whether the host gets copies of its predictions: heads may write into them, and spoil the next evaluation."""
        return not self._trusted

    def _meet(self, call: Call) -> None:
        """What is found out in the first step: whether and how this loss can be weighed."""
        try:
            call.batch.check()
        except ValueError as error:
            raise cannot_be_weighed(self.title, str(error)) from error
        with torch.no_grad():
            alone = self._evaluate_alone(call.batch)
        call.reset()
        for losses in alone:
            for path, loss in losses.items():
                self._check_scalar(path, loss)
        self._learn(call, alone)
        call.reset()
        self._met = self._trusted or prove_samples_alike(
            self._call_aside, call.batch, call.reset, self.title, self._apart
        )
        if call.batch.batch_size > 1:
            self._memory.settle()

    def _call(self, arguments: Mapping[str, Any]) -> Any:
        bound = inspect.BoundArguments(self._signature, dict(arguments))  # type: ignore[arg-type]
        return self.host(*bound.args, **bound.kwargs)

    def _call_aside(self, arguments: Mapping[str, Any]) -> Any:
        """A call beside the host's own: the loss does not remember it."""
        with self._memory.aside():
            return self._call(arguments)

    def _evaluate_host(self, batch: BatchedArguments, *, mean_over_valid: bool = False) -> Any:
        """The host's own evaluation of the batch, the gradient of each sample's predictions times its weight."""

        def scaled(tensor: Tensor, axis: int, rows: list[int] | None) -> Tensor:
            tensor = self.weigher.scale_gradient(tensor, axis, rows, mean_over_valid=mean_over_valid)
            return tensor.clone() if self._writable else tensor

        return self._call(batch.mapped(scaled))

    def _evaluate_alone(self, batch: BatchedArguments, guard: Unguarded = _UNGUARDED) -> list[dict[tuple, Tensor]]:
        """The losses of each sample alone, by their path in the host's result."""
        try:
            samples = guard.around(batch).samples()
        except ValueError as error:
            raise cannot_be_weighed(self.title, str(error)) from error
        alone = []
        for i, arguments in enumerate(samples):
            try:
                with guard.of(i):
                    alone.append(dict(losses_in(self._call_aside(arguments))))
            except (RuntimeError, IndexError, ValueError, AssertionError, TypeError) as error:
                why = f"it could not be evaluated on sample {i} of the batch alone ({type(error).__name__}: {error})"
                raise cannot_be_weighed(self.title, why) from error
        return alone

    def _per_sample(self, result: Any, alone: list[dict[tuple, Tensor]]) -> dict[tuple, Tensor]:
        """Path of each loss in the host's result, and its values on the samples alone, shape ``(B,)``."""
        per_sample = {}
        for path, loss in losses_in(result):
            if any(path not in losses for losses in alone):
                why = f"it gives {written(path)} for the batch, but not for each of its samples alone"
                raise cannot_be_weighed(self.title, why)
            values = [losses[path] for losses in alone]
            for each in (loss, *values):
                self._check_scalar(path, each)
            if loss.numel():  # an empty one says that nothing was there to train on
                per_sample[path] = stack_scalars([value.sum() for value in values])
        return per_sample

    def _check_scalar(self, path: tuple, loss: Tensor) -> None:
        if loss.numel() > 1:
            raise ValueError(
                f"{self.title} cannot be weighed: expected a scalar for {written(path)}, got the shape "
                f"{tuple(loss.shape)}; use reduction='mean', or {HOW_TO}"
            )

    def _score(self, own: Mapping[tuple, Tensor], valid: Tensor | None) -> None:
        """Score the samples by the sum of their losses, if these count and there are any."""
        if self.scored and own:
            self.weigher.score(torch.stack([losses.detach() for losses in own.values()]).sum(0), valid)

    def _distrust(self, loss: Tensor, own: Tensor | None) -> None:
        """Whose loss it is that spoils the batch's; if nobody's, or if nobody knows, all are in it."""
        broken = ~loss.detach().isfinite().all()
        if own is not None:
            finite = own.isfinite()
            broken = broken & (~finite | finite.all())
        self.weigher.distrust(broken)
