"""Samples whose own loss cannot be trained on: kept out of the objective and of every gradient.

Alone, a sample without a valid pixel or a box may give 0/0, or a loss over an epsilon, where the host's loss of the
whole batch is sound. To leave its loss out is not enough: on the way back to the predictions, 0 times an infinite
derivative is NaN. Which samples these are is known on the device only, and a look at it would make the step wait. So
every sample is evaluated behind a barrier, which stops its gradient if the sample turns out not to be sound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.devices import moved
from .dissect.arguments import BatchedArguments
from .dissect.results import loss_at
from .gradients import along

# A blank sample's own loss is taken as sound up to this multiple of the batch's: Sparse R-CNN's of an image
# without boxes is 10^5 times it, those of heads that clamp their number of positives are below it.
_SOUND = 1000.0


class Verdict:
    """Which samples of a batch are sound, shape ``(B,)``, bool: known after the forward pass, asked in the backward."""

    def __init__(self) -> None:
        self.sound: Tensor | None = None

    def of_entries(self, axis: int, rows: list[int] | None, gradient: Tensor) -> Tensor:
        """Which entries of a prediction's gradient belong to sound samples; arguments as :func:`.along` takes them."""
        assert self.sound is not None
        return along(moved(self.sound, gradient.device), gradient, axis, rows)

    def of_sample(self, sample: int, gradient: Tensor) -> Tensor:
        """Whether a sample is sound, a scalar on the device of a gradient that its loss gave."""
        assert self.sound is not None
        return moved(self.sound, gradient.device)[sample]


class Barrier(torch.autograd.Function):
    """Forward the tensors, backward their gradients where they come from sound samples, else 0.

    Args:
        sound (Callable): ``sound(gradient)`` tells where a gradient comes from sound samples: bool, of a shape that
            broadcasts to the gradient's.
        tensors (Tensor): Predictions or parameters.
    """

    @staticmethod
    def forward(ctx: Any, sound: Callable[[Tensor], Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.sound = sound
        ctx.set_materialize_grads(False)
        return tuple(each.view_as(each) for each in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *(None if each is None else torch.where(ctx.sound(each), each, 0) for each in grads)


class Quarantine:
    """Keeps the gradients of samples that are not sound out of a model.

    Args:
        owner (nn.Module): The loss or head that is evaluated on each sample alone.
    """

    def __init__(self, owner: nn.Module) -> None:
        self._places = [(part, name) for part in owner.modules() for name in part._parameters]
        self._looked = False
        self._leaks = False

    def around(self, batch: BatchedArguments, verdict: Verdict) -> BatchedArguments:
        """The arguments of a call, with barriers before the predictions."""

        def guarded(tensor: Tensor, axis: int, rows: list[int] | None) -> Tensor:
            return Barrier.apply(partial(verdict.of_entries, axis, rows), tensor)[0]

        return batch.with_predictions(guarded)

    @contextmanager
    def of(self, sample: int, verdict: Verdict) -> Iterator[None]:
        """Evaluate a sample with a barrier before the parameters."""
        found = ((part, name, part._parameters.get(name)) for part, name in self._places)
        trained = [(part, name, each) for part, name, each in found if each is not None and each.requires_grad]
        if trained:
            guarded = Barrier.apply(partial(verdict.of_sample, sample), *(each for *_, each in trained))
            for (part, name, _), each in zip(trained, guarded, strict=True):
                part._parameters[name] = each
        try:
            yield
        finally:
            for part, name, original in trained:
                part._parameters[name] = original

    def leaks(self, losses: Iterable[Tensor]) -> bool:
        """Whether the losses of samples depend on parts of the model without a barrier; looked up in the first call."""
        if not self._looked:
            self._looked, self._leaks = True, _reach_a_leaf(losses)
        return self._leaks


def soundness(per_sample: Mapping[tuple, Tensor], result: Any, valid: Tensor | None) -> Tensor:
    """Which samples' own losses can be trained on.

    Args:
        per_sample (Mapping): Path of each loss in the host's result, at least one, and its values on the samples alone,
            shape ``(B,)``.
        result: What the host gives for the batch.
        valid (Tensor, optional): Which samples have something to be scored by, shape ``(B,)``, bool, on any device;
            None where nobody knows.

    Returns:
        Tensor: Shape ``(B,)``, bool, on the device of the losses.
    """
    own = torch.stack([losses.detach().abs() for losses in per_sample.values()]).sum(0)
    whole = torch.stack([loss_at(result, path).detach().float().abs().sum() for path in per_sample]).sum()
    if valid is not None:
        return (own <= _SOUND * whole) | moved(valid, own.device)
    # Of a loss that nobody knows, only a 0/0 tells of a sample with nothing in it, beside others with something.
    finite = own.isfinite()
    return finite | ~(whole.isfinite() & finite.any())


def _reach_a_leaf(losses: Iterable[Tensor]) -> bool:
    """Whether there is a way from some losses to a leaf of their graph that meets no barrier."""
    stack: list[Any] = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    seen = set()
    while stack:
        node = stack.pop()
        if node in seen or isinstance(node, Barrier._backward_cls):  # type: ignore[attr-defined]
            continue
        if hasattr(node, "variable"):
            return True
        seen.add(node)
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return False
