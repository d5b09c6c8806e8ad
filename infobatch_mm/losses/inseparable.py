"""The view of losses that do not separate over samples, and are evaluated on each sample alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.distributed import world_size
from .dissect.arguments import BatchedArguments, stack_scalars
from .dissect.results import loss_at, losses_in, replace_losses
from .reduction import Reduction
from .samplewise import Call, SamplewiseView
from .sound import Guard, Quarantine, soundness


class InseparableView(SamplewiseView):
    """Optimises the host's loss in full passes, and in pruned ones the losses of the samples alone.

    In a pruned pass that is the mean, or the sum, of weight_i * l_i, l_i being the host's loss on sample i alone. In a
    full pass all weights are 1 and the host's own evaluation is trained on. The form is chosen for a pass and never for
    a batch: else the objective would hop between two losses within a pass.

    Args:
        reduction (str, optional): Whether the host's loss is a ``'mean'`` or a ``'sum'`` over samples. Defaults to
            None: it is found out in the first step, or refused (:class:`.Reduction`).
        args, kwargs: As :class:`SamplewiseView` takes them.
    """

    separable = False

    def __init__(self, *args: Any, reduction: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reduction = Reduction(self.title, reduction, self._how_to_say(), self._trusted)
        self._quarantine = Quarantine(self.owner)

    def _weighed(self, call: Call) -> Any:
        return self._of_pruned_pass(call) if self.weigher.pruned else self._of_full_pass(call)

    def _of_full_pass(self, call: Call) -> Any:
        """The host's own evaluation carries the gradient; the samples are evaluated for their scores only."""
        alone = None
        if self.scored:
            with torch.no_grad():
                alone = self._evaluate_alone(call.batch)
            self._learn(call, alone)
        call.reset()
        result = self._evaluate_host_marked(call.batch)
        own = {} if alone is None else self._per_sample(result, alone)
        self._score(own, call.valid)
        for path, loss in losses_in(result):
            self._distrust(loss, own.get(path))
        return result

    def _of_pruned_pass(self, call: Call) -> Any:
        """The evaluations of the samples carry the gradient; the host's gives the value to be compared with."""
        trains = torch.is_grad_enabled()
        # Barriers cost time: only where somebody tells samples with nothing in them, or a sample may be 0/0 alone.
        guard = self._quarantine.guard() if trains and (call.valid is not None or self._apart) else None
        alone = self._evaluate_alone(call.batch) if guard is None else self._evaluate_alone(call.batch, guard)
        self._learn(call, alone)
        call.reset()
        result = self._evaluate_host_value(call.batch)
        own = self._per_sample(result, alone)
        self._score(own, call.valid)
        if guard is not None and own:
            own = self._without_unsound(own, result, alone, call.valid, guard)
        weighed = {}
        for path, losses in own.items():
            normaliser = self._reduction.normaliser(path, len(losses))
            weighed[path] = self.weigher.weigh_own(losses, loss_at(result, path), normaliser, self.title)
        if trains and any(path not in own for path, _ in losses_in(result)):
            # Nothing was there to train on: the host knows what that is worth.
            call.reset()
            with self._memory.aside():
                result = self._evaluate_host_marked(call.batch)
        return replace_losses(result, weighed)

    def _evaluate_host_value(self, batch: BatchedArguments) -> Any:
        """The host's own evaluation of the batch, without gradient."""
        with torch.no_grad():
            if not self._writable:
                return self._call(batch.arguments)
            return self._call(batch.mapped(lambda tensor, axis, rows: tensor.detach().clone()))

    def _evaluate_host_marked(self, batch: BatchedArguments) -> Any:
        """The host's own evaluation of the batch, whose losses count as weighed.

        All weights are 1, whatever way a loss takes to a parameter; without the mark, one that reaches it past the
        predictions would be refused as unweighed.
        """
        result = self._evaluate_host(batch)
        return replace_losses(result, {path: self.weigher.mark(loss) for path, loss in losses_in(result)})

    def _without_unsound(
        self,
        own: dict[tuple, Tensor],
        result: Any,
        alone: list[dict[tuple, Tensor]],
        valid: Tensor | None,
        guard: Guard,
    ) -> dict[tuple, Tensor]:
        """The losses of the samples, 0 where a sample's own cannot be trained on."""
        guard.sound = sound = soundness(own, result, valid)
        if not self._quarantine.leaks(own.values()):
            return {path: torch.where(sound, losses, 0) for path, losses in own.items()}
        # No barrier stands before what a loss remembers of the model by itself: look, and leave the samples out.
        kept = [
            each if keep else {path: torch.zeros_like(loss) for path, loss in each.items()}
            for each, keep in zip(alone, sound.tolist(), strict=True)
        ]
        return self._per_sample(result, kept)

    def _learn(self, call: Call, alone: list[dict[tuple, Tensor]]) -> None:
        """See whether losses are averaged over the batch or summed, if that is not known yet."""
        if len(alone) < 2 or not torch.is_grad_enabled() or not self.weigher.batch.planned:
            return
        # A host's loss may wait for the other processes' in each evaluation: only the first time all of them make some.
        known = not self._reduction.unknown(alone[0])
        if self._reduction.asked and (known or (self._trusted and world_size() > 1)):
            return
        paths = [path for path in alone[0] if all(path in losses for losses in alone)]
        own = {path: stack_scalars([losses[path].detach().sum() for losses in alone]) for path in paths}
        self._reduction.learn(self._call_aside, call.batch, own, call.valid)

    def _how_to_say(self) -> str:
        """How a user says whether the loss is a mean or a sum, for messages."""
        name = type(self.owner).__name__
        if self.attribute == "forward":
            return f"register_samplewise_loss({name}, reduction='mean'), or reduction='sum'"
        return f"register_head_rule({name}, HeadRule(method={self.attribute!r}, reduction='mean')), or reduction='sum'"
