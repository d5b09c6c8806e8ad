"""The universal view: a host's own loss, evaluated on each sample of the batch alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core import rng
from ..core.devices import moved
from ..core.distributed import world_size
from .dissect.arguments import BatchedArguments, stack_scalars
from .dissect.memory import Memory
from .dissect.proof import check_order, prove_samples_alike
from .dissect.results import loss_at, losses_in, replace_losses, written
from .reduction import Reduction
from .refusals import HOW_TO, cannot_be_weighed
from .sound import Quarantine, Verdict, soundness
from .view import LossView, asks_for_elements
from .weigher import LossWeigher


class SamplewiseView(LossView):
    """Evaluates the host's own loss on each sample alone: for losses that nobody wrote a view of.

    Where a loss separates over samples, the host's own evaluation is optimised, with the gradient of each
    sample's predictions multiplied by its weight. Where it does not, that is so in full passes (all weights
    are 1), and in pruned ones the mean, or the sum, of weight_i * l_i is optimised, l_i being the host's loss on
    sample i alone. l_i is the score. The host's value is shown in full passes, in pruned ones what is comparable with
    it (:mod:`.logged`).

    Args:
        separable (bool): Whether the loss is a sum over samples once its normaliser is held.
        trusted (bool): Whether the host's loss is known to treat the samples alike, and not to write into
            its predictions. Others are put to the proof in the first step.
        apart (bool): Whether to refuse, in the first step, a loss that compares the samples of a batch with one
            another: in a contrastive one no sample has a loss of its own.
        reduction (str, optional): ``'mean'`` or ``'sum'`` over samples, of a loss that is not separable. Defaults to
            None: it is found out in the first step, or refused (:class:`.Reduction`).
        mean_over_valid (bool): Whether the normaliser of a separable loss counts the valid elements of the batch, see
            :meth:`.LossWeigher.begin`. Defaults to False.
        shares (Callable, optional): ``shares(owner, arguments)`` gives what each sample contributes to a separable
            loss, shape ``(B,)``, for the value that is shown in pruned passes. Defaults to the samples' own losses,
            which are other shares where a loss is normalised by what differs from sample to sample.
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
        apart: bool = False,
        reduction: str | None = None,
        mean_over_valid: bool = False,
        shares: Callable[[nn.Module, dict], Tensor] | None = None,
        axes: Mapping[str, int | None] | None = None,
        rows: Callable[[nn.Module, dict], dict[str, list[int]]] | None = None,
        valid: Callable[[nn.Module, dict], Tensor | None] | None = None,
    ) -> None:
        super().__init__(owner, attribute, weigher, scored, title)
        self.separable = separable
        self._trusted = trusted
        self._apart = apart
        self._mean_over_valid, self._shares = mean_over_valid, shares
        self._met = False
        self._memory = Memory(owner)
        self._quarantine = Quarantine(owner)
        self._reduction = Reduction(title, reduction, _how_to_say(owner, attribute), trusted)
        # Heads may write into their predictions: only losses that are known not to get the originals.
        self._writable = not trusted
        self._axes, self._rows, self._valid = axes, rows, valid
        self._signature = inspect.signature(self.host)

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        if asks_for_elements(args, kwargs):
            return self.host(*args, **kwargs)
        batch = self._batched(args, kwargs)
        valid = None if self._valid is None else self._valid(self.owner, dict(batch.arguments))
        held = self.separable or not self.weigher.pruned
        generators = rng.capture()
        if not self._met and torch.is_grad_enabled():
            self._meet(batch, valid, partial(rng.restore, generators))
            rng.restore(generators)
        optimised = torch.is_grad_enabled() and not held
        verdict = Verdict() if optimised and (valid is not None or self._apart) else None
        alone = None
        if self.scored or (self.weigher.pruned and self._shares is None):  # a pruned pass shows what they come to
            with torch.set_grad_enabled(optimised):
                alone = self._evaluate_alone(batch, verdict)
            self._learn_reductions(batch, alone, valid)
        # The host comes last: what it remembers of the batch, and what it draws, is as it is without us.
        rng.restore(generators)
        result = self._evaluate_host(batch, held)
        per_sample = {} if alone is None else self._per_sample(result, alone)
        if self.scored and per_sample:
            self.weigher.score(torch.stack([losses.detach() for losses in per_sample.values()]).sum(0), valid)
        if held:
            return self._of_host(result, per_sample, valid, batch.arguments)
        empty = [path for path, _ in losses_in(result) if path not in per_sample]
        if verdict is not None and per_sample and alone is not None:
            per_sample = self._without_unsound(per_sample, result, alone, valid, verdict)
        weighed = {}
        for path, losses in per_sample.items():
            normaliser = self._reduction.normaliser(path, len(losses))
            weighed[path] = self.weigher.weigh(losses, loss_at(result, path), normaliser, self.title, own=True)
        if empty and torch.is_grad_enabled():  # nothing was there to train on: the host knows what that is worth
            rng.restore(generators)
            with self._memory.aside():
                result = self._evaluate_host(batch, held=True)
        return replace_losses(result, weighed)

    def _of_host(
        self, result: Any, per_sample: dict[tuple, Tensor], valid: Tensor | None, arguments: Mapping[str, Any]
    ) -> Any:
        """The host's losses of the batch, which are trained on by its own evaluation."""
        shares = None
        if self._shares is not None and self.weigher.pruned:
            with torch.no_grad():
                shares = self._shares(self.owner, dict(arguments))
        shown = {}
        for path, loss in losses_in(result):
            own = per_sample.get(path, shares)
            self._distrust(loss, own)
            if shares is not None:
                shown[path] = self.weigher.of_host(loss, shares, own=False)
            elif own is not None and self.separable:
                if valid is not None:  # a sample without a valid pixel may be 0/0 alone
                    own = torch.where(moved(valid, own.device) | own.isfinite(), own, 0)
                shown[path] = self.weigher.of_host(loss, own, own=True)
        return replace_losses(result, shown)

    def _distrust(self, loss: Tensor, own: Tensor | None) -> None:
        """Whose loss it is that spoils the batch's; if nobody's, or if nobody knows, all are in it."""
        broken = ~loss.detach().isfinite().all()
        if own is not None:
            finite = own.isfinite()
            broken = broken & (~finite | finite.all())
        self.weigher.distrust(broken)

    def _without_unsound(
        self,
        per_sample: dict[tuple, Tensor],
        result: Any,
        alone: list[dict[tuple, Tensor]],
        valid: Tensor | None,
        verdict: Verdict,
    ) -> dict[tuple, Tensor]:
        """The losses of the samples, 0 for those whose own cannot be trained on."""
        verdict.sound = sound = soundness(per_sample, result, valid)
        if not self._quarantine.leaks(per_sample.values()):
            return {path: torch.where(sound, losses, 0) for path, losses in per_sample.items()}
        # No barrier stands before what a loss remembers of the model by itself: look, and leave the samples out.
        kept = [
            each if keep else {path: torch.zeros_like(loss) for path, loss in each.items()}
            for each, keep in zip(alone, sound.tolist(), strict=True)
        ]
        return self._per_sample(result, kept)

    def _batched(self, args: tuple, kwargs: dict) -> BatchedArguments:
        bound = self._signature.bind(*args, **kwargs).arguments
        check_order(self.title, self.weigher.data_samples, bound.values())
        rows = None if self._rows is None else self._rows(self.owner, bound)
        return BatchedArguments(bound, self.weigher.batch_size, self._axes, rows, self._writable)

    def _meet(self, batch: BatchedArguments, valid: Tensor | None, reset: Callable[[], None]) -> None:
        """What is found out in the first step: whether and how this loss can be weighed."""
        try:
            batch.check()
        except ValueError as error:
            raise cannot_be_weighed(self.title, str(error)) from error
        with torch.no_grad():
            alone = self._evaluate_alone(batch)
            reset()
        for losses in alone:
            for path, loss in losses.items():
                self._check_scalar(path, loss)
        self._learn_reductions(batch, alone, valid)
        reset()
        self._met = self._trusted or prove_samples_alike(self._call_aside, batch, reset, self.title, self._apart)
        if batch.batch_size > 1:
            self._memory.settle()

    def _learn_reductions(
        self, batch: BatchedArguments, alone: list[dict[tuple, Tensor]], valid: Tensor | None
    ) -> None:
        """See whether losses are averaged over the batch or summed, if that is not known yet."""
        if self.separable or len(alone) < 2 or not torch.is_grad_enabled() or not self.weigher.planned:
            return
        # A host's loss may wait for the other processes' in each evaluation: only the first time all of them make some.
        known = not self._reduction.unknown(alone[0])
        if self._reduction.asked and (known or (self._trusted and world_size() > 1)):
            return
        paths = [path for path in alone[0] if all(path in losses for losses in alone)]
        own = {path: stack_scalars([losses[path].detach().sum() for losses in alone]) for path in paths}
        self._reduction.learn(self._call_aside, batch, own, valid)

    def _call(self, arguments: Mapping[str, Any]) -> Any:
        bound = inspect.BoundArguments(self._signature, dict(arguments))  # type: ignore[arg-type]
        return self.host(*bound.args, **bound.kwargs)

    def _call_aside(self, arguments: Mapping[str, Any]) -> Any:
        """A call beside the host's own: the loss does not remember it."""
        with self._memory.aside():
            return self._call(arguments)

    def _evaluate_host(self, batch: BatchedArguments, held: bool) -> Any:
        """The host's own evaluation of the batch, for its gradient or only for its value."""
        if not held:
            with torch.no_grad():
                if not self._writable:
                    return self._call(batch.arguments)
                return self._call(batch.mapped(lambda tensor, axis, rows: tensor.detach().clone()))

        def scaled(tensor: Tensor, axis: int, rows: list[int] | None) -> Tensor:
            tensor = self.weigher.scale_gradient(tensor, axis, rows, mean_over_valid=self._mean_over_valid)
            return tensor.clone() if self._writable else tensor

        result = self._call(batch.mapped(scaled))
        if self.separable:
            return result
        # A full pass: all weights are 1, whatever way a loss takes to a parameter.
        return replace_losses(result, {path: self.weigher.mark(loss) for path, loss in losses_in(result)})

    def _evaluate_alone(self, batch: BatchedArguments, verdict: Verdict | None = None) -> list[dict[tuple, Tensor]]:
        """The losses of each sample alone, by their path in the host's result."""
        try:
            if verdict is not None:
                batch = self._quarantine.around(batch, verdict)
            samples = batch.samples()
        except ValueError as error:
            raise cannot_be_weighed(self.title, str(error)) from error
        alone = []
        for i, arguments in enumerate(samples):
            try:
                with nullcontext() if verdict is None else self._quarantine.of(i, verdict):
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


def _how_to_say(owner: nn.Module, attribute: str) -> str:
    """How a user says whether a loss is a mean or a sum, for messages."""
    name = type(owner).__name__
    if attribute == "forward":
        return f"register_samplewise_loss({name}, reduction='mean'), or reduction='sum'"
    return f"register_head_rule({name}, HeadRule(method={attribute!r}, reduction='mean')), or reduction='sum'"
