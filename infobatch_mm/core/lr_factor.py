"""Learning rates of smaller batches: multiplied for the step alone, and put back before a scheduler looks at them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.optim import Optimizer

#: Power of the share C of a full batch by which the learning rate of a smaller one is multiplied, by name.
LR_RULES = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


def lr_factor(rule: str, share: float) -> float:
    """What the learning rate of a step on a smaller batch is multiplied by.

    Args:
        rule (str): ``'linear'``, the share itself, which keeps the noise of SGD (Goyal et al., 2017); ``'sqrt'``, its
            root, which keeps the noise of Adam (Malladi et al., NeurIPS 2022); ``'none'``, 1.
        share (float): Batch of the pass over the full batch, C in (0, 1].

    Returns:
        float: In (0, 1].
    """
    return share ** LR_RULES[rule]


class LearningRateFactor:
    """Multiplies the learning rates of a run's optimisers for the time of each step.

    Schedulers compute their next value from the one in the parameter groups, logs and checkpoints read it there: to
    all of them it is the host's own, as each step puts back the very value that it found. Hooks on these optimiser
    objects alone, by torch's own ``register_step_pre_hook``. A factor of 1 touches nothing.

    Args:
        optimizers (Iterable[Optimizer]): Whose steps.
        factor (Callable[[], float]): A bound method, asked before each step. Not kept alive: where its object is gone,
            the factor is 1.

    Raises:
        ValueError: For an optimiser without a learning rate in its parameter groups, or without hooks.
    """

    def __init__(self, optimizers: Iterable[Any], factor: Callable[[], float]) -> None:
        self._factor = WeakMethod(factor)
        self._held: dict[int, list[tuple[dict[str, Any], Any]]] = {}
        self._handles: list[Any] = []
        self._optimizers: dict[int, Optimizer] = {}
        for optimizer in optimizers:
            self.follow(optimizer)

    def follow(self, optimizer: Any) -> None:
        """Follow the steps of one more optimiser; of one that is followed already nothing changes.

        Raises:
            ValueError: As above.
        """
        if id(optimizer) in self._optimizers:
            return
        check_rates(optimizer)
        self._optimizers[id(optimizer)] = optimizer
        self._handles += [
            optimizer.register_step_pre_hook(self._multiply),
            optimizer.register_step_post_hook(self._put_back),
        ]

    def remove(self) -> None:
        """Give the optimisers their steps back."""
        for handle in self._handles:
            handle.remove()
        for optimizer in self._optimizers.values():
            self._put_back(optimizer)
        self._handles, self._optimizers = [], {}

    @torch.no_grad()
    def _multiply(self, optimizer: Optimizer, *_: Any) -> None:
        # What a step that raised has left; or the same step once more, of a subclass that calls its parent's.
        self._put_back(optimizer)
        method = self._factor()
        factor = 1.0 if method is None else method()
        if factor == 1.0:
            return
        held = self._held[id(optimizer)] = []
        tensors: set[int] = set()  # one may be the rate of several groups
        for group in optimizer.param_groups:
            rate = group["lr"]
            if not isinstance(rate, Tensor):
                held.append((group, rate))
                group["lr"] = rate * factor
            elif id(rate) not in tensors:  # in place: compiled and captured steps know the tensor
                tensors.add(id(rate))
                held.append((group, rate.clone()))
                rate.mul_(factor)

    @torch.no_grad()
    def _put_back(self, optimizer: Optimizer, *_: Any) -> None:
        for group, rate in self._held.pop(id(optimizer), ()):
            if isinstance(rate, Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate


def check_rates(optimizer: Any) -> None:
    """Refuse an optimiser whose learning rate cannot be multiplied for a step.

    Raises:
        ValueError: With its class, and what to do.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"keep='steps' multiplies learning rates around the steps of a torch.optim.Optimizer, got {name}: say "
            "lr_rule='none' to leave them as they are, or use keep='batch'"
        )
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(
            f"{name} has no learning rate in its parameter groups that smaller batches could be given a share of: say "
            "lr_rule='none' to leave its steps as they are, or use keep='batch'"
        )
