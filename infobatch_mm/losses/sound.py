"""Samples whose own loss cannot be trained on: kept out of the objective and of every gradient.

Alone, a sample without a valid pixel or a box may give 0/0, or a loss over an epsilon, where the host's loss of the
whole batch is sound. To leave its loss out is not enough: on the way back to the predictions, 0 times an infinite
derivative is NaN. Which samples these are is known on the device only, and a look at it would make the step wait. So
every sample is evaluated behind a barrier, which stops its gradient if the sample turns out not to be sound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.devices import moved
from .dissect.arguments import BatchedArguments
from .dissect.results import loss_at
from .gradients import along

# A blank sample's own loss is taken as sound up to this multiple of the batch's loss. Sparse R-CNN gives 10^5 times
# the batch's for an image without boxes; heads that clamp their number of positives stay below it.
_SOUND = 1000.0


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


class Unguarded:
    """Evaluates samples without a barrier: nothing is trained on, or nobody could tell which samples are sound."""

    def around(self, batch: BatchedArguments) -> BatchedArguments:
        """The arguments of a call, to be taken apart."""
        return batch

    def of(self, sample: int) -> AbstractContextManager[None]:
        """Evaluate a sample."""
        return nullcontext()


class Guard(Unguarded):
    """The barriers of one batch.

    Args:
        places (list): Parts of the model and names of their parameters.

    Attributes:
        sound (Tensor, optional): Which samples are sound, shape ``(B,)``, bool: known after the forward pass, asked in
            the backward.
    """

    def __init__(self, places: list[tuple[nn.Module, str]]) -> None:
        self._places = places
        self.sound: Tensor | None = None

    def around(self, batch: BatchedArguments) -> BatchedArguments:
        """The arguments of a call, with barriers before the predictions."""

        def guarded(tensor: Tensor, axis: int, rows: list[int] | None) -> Tensor:
            return Barrier.apply(partial(self._sound_entries, axis, rows), tensor)[0]

        return batch.with_predictions(guarded)

    @contextmanager
    def of(self, sample: int) -> Iterator[None]:
        """Evaluate a sample with a barrier before the parameters."""
        found = ((part, name, part._parameters.get(name)) for part, name in self._places)
        trained = [(part, name, each) for part, name, each in found if each is not None and each.requires_grad]
        if trained:
            guarded = Barrier.apply(partial(self._is_sound, sample), *(each for *_, each in trained))
            for (part, name, _), each in zip(trained, guarded, strict=True):
                part._parameters[name] = each
        try:
            yield
        finally:
            # A parameter that stays a barrier's output is no leaf: the optimiser would train it no more.
            for part, name, original in trained:
                part._parameters[name] = original

    def _sound_entries(self, axis: int, rows: list[int] | None, gradient: Tensor) -> Tensor:
        """Which entries of a prediction's gradient belong to sound samples; arguments as :func:`.along` takes them."""
        assert self.sound is not None
        return along(moved(self.sound, gradient.device), gradient, axis, rows)

    def _is_sound(self, sample: int, gradient: Tensor) -> Tensor:
        """Whether a sample is sound, a scalar on the device of a gradient that its loss gave."""
        assert self.sound is not None
        return moved(self.sound, gradient.device)[sample]


class Quarantine:
    """Keeps the gradients of samples that are not sound out of a model.

    Args:
        owner (nn.Module): The loss or head that is evaluated on each sample alone.
    """

    def __init__(self, owner: nn.Module) -> None:
        self._places = [(part, name) for part in owner.modules() for name in part._parameters]
        self._leaks: bool | None = None

    def guard(self) -> Guard:
        """Barriers for one batch."""
        return Guard(self._places)

    def leaks(self, losses: Iterable[Tensor]) -> bool:
        """Whether the losses of samples depend on parts of the model without a barrier; looked up in the first call."""
        if self._leaks is None:
            self._leaks = _reach_a_leaf(losses)
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
