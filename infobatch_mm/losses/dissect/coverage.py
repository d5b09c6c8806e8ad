"""Proof that no part of a loss reaches the model's parameters unweighed.

Every weighted loss has one of two nodes in its graph: one that stands for a weighted objective, or one that
multiplies the gradient of predictions. A way from a loss to a parameter that meets neither is a term that
would be trained on without its weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..gradients import ScaledGradient, ValueOfOne
from ..refusals import HOW_TO

_WEIGHED = (ValueOfOne._backward_cls, ScaledGradient._backward_cls)  # type: ignore[attr-defined]
#: A compiled function is one node, in which nothing can be seen; so are ours within one.
_COMPILED = ("CompiledFunctionBackward", "ApplyTemplateBackward")


class Coverage:
    """Refuses a model with a loss that is not weighed, when the loss is first seen in a form of pass.

    Args:
        model (nn.Module): The model, for the names of its parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: set[tuple] = set()

    def check(self, losses: Mapping[tuple, Tensor], pruned: bool, parsed: bool = False) -> None:
        """Check each loss once.

        Args:
            losses (Mapping): Path in the host's dict of losses to the loss, with its graph.
            pruned (bool): Whether the batch is part of a pruned pass.
            parsed (bool): Whether these are what is optimised, and not what the heads gave.

        Raises:
            ValueError: With the name of the loss and of a parameter that it would train unweighed.
        """
        if torch.compiler.is_compiling():  # there is no graph to look at
            return
        for path, loss in losses.items():
            if not loss.requires_grad or (path, pruned, parsed) in self._seen:
                continue
            parameter = _unweighed_parameter(loss)
            if parameter is not None:
                names = (name for name, each in self._model.named_parameters() if each is parameter)
                raise ValueError(
                    f"{type(self._model).__name__} has a loss that no view weighs: {'.'.join(map(str, path))} trains "
                    f"{next(names, 'its input')} without the samples' weights; {HOW_TO}"
                )
            self._seen.add((path, pruned, parsed))


def _unweighed_parameter(loss: Tensor) -> Tensor | None:
    """A leaf of the loss's graph that is reached past all weighing, or None."""
    if loss.grad_fn is None:
        return loss if loss.requires_grad else None
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node in seen or isinstance(node, _WEIGHED) or type(node).__name__ in _COMPILED:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            return leaf
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return None
