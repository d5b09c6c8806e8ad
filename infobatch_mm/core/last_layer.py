"""The last layer of a user's model, as a loop or a script names it, and where a batch's norms come from."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from .sample_norms import SampleNorms, is_known
from .score_rule import ScoreRule

# Calls that are kept until one of them is known to be the losses' own: a look at the accuracy, or another model's turn.
_MOST_CALLS = 8
# Steps in which the graph is looked through, also where only one call can be meant.
_PROOFS = 2


class _Call(NamedTuple):
    """One call of the layer."""

    norms: ref[SampleNorms]
    output: ref[Tensor]
    size: int

    def may_be_of(self, losses: Tensor) -> bool:
        """Whether some losses come from it, as far as that can be told."""
        output = self.output()
        return self.norms() is not None and (output is None or comes_from(losses, output))


class LastLayer:
    """Watches the last layer of a model.

    Args:
        layer (nn.Module): A linear layer or a plain convolution, which is called once for the losses of each batch.

    Raises:
        ValueError: If its gradient cannot be taken apart by sample.
    """

    def __init__(self, layer: nn.Module) -> None:
        if not is_known(layer):
            raise ValueError(
                f"the gradient of a {type(layer).__name__} cannot be taken apart by sample: give an nn.Linear, or a "
                "convolution without groups, that the losses are computed from; or weigh(..., outputs=...)"
            )
        # Traced into a compiled model, the hook on the output would never be called.
        self._handle = layer.register_forward_hook(torch.compiler.disable(self._called), with_kwargs=True)
        self._calls: list[_Call] = []
        self._taken: _Call | None = None
        self._proofs = 0

    def _called(self, layer: nn.Module, arguments: tuple, options: dict[str, Any], output: Any) -> None:
        given = [each for each in (*arguments, *options.values()) if isinstance(each, Tensor)]
        if torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad and given:
            norms = SampleNorms()
            norms.watch_layer(layer, given[0], output)
            # Not kept alive: the graph of a step that is never trained on would stay. The norms live as long as it.
            self._calls = [*self._calls[1 - _MOST_CALLS :], _Call(ref(norms), ref(output), len(output))]

    def take(self, losses: Tensor) -> SampleNorms:
        """The norms to come of the call that some losses were computed from.

        Args:
            losses (Tensor): Shape ``(B,)``, with a gradient.

        Raises:
            ValueError: If there is no such call, or more than one.
        """
        calls, self._calls = self._calls, []
        fitting = [each for each in calls if each.size == len(losses) and each.norms() is not None]
        if len(fitting) != 1 or self._proofs < _PROOFS:
            self._proofs += 1
            # Of an output that nobody holds any more nothing can be told; the pass's end looks whether norms came.
            fitting = [each for each in fitting if each.may_be_of(losses)]
        if not fitting and self._taken is not None and self._taken.may_be_of(losses):
            return SampleNorms()  # a second loss of the same forward pass: the first one's norms are known already
        norms = fitting[0].norms() if len(fitting) == 1 else None
        if norms is None:
            called = "was not called" if not fitting else f"was called {len(fitting)} times"
            raise ValueError(
                f"the layer that observe() was given {called} with the {len(losses)} samples of this weigh(), in the "
                "forward pass that the losses come from: name a layer that each batch goes through once, or give "
                "weigh(..., outputs=...)"
            )
        self._taken = fitting[0]
        return norms

    def remove(self) -> None:
        """Watch it no longer."""
        self._handle.remove()


def comes_from(losses: Tensor, source: Tensor) -> bool:
    """Whether a gradient of the losses comes by a tensor: looks through the graph, from the losses on."""
    node, seen = source.grad_fn, set()
    waiting = [losses.grad_fn]
    while waiting:
        found = waiting.pop()
        if found is None or found in seen:
            continue
        if found is node or (node is None and getattr(found, "variable", None) is source):
            return True
        seen.add(found)
        waiting.extend(each for each, _ in found.next_functions)
    return False


def norms_to_come(
    rule: ScoreRule, layer: LastLayer | None, losses: Tensor, outputs: Tensor | None
) -> SampleNorms | None:
    """Where the norms of a batch's samples will come from: the last layer, else the outputs, else nowhere.

    Args:
        rule (ScoreRule): One that takes norms; it learns what they are of.
        layer (LastLayer, optional): What the user has named as the last layer.
        losses (Tensor): Losses of the samples, shape ``(B,)``.
        outputs (Tensor, optional): What the losses were computed from, shape ``(B, ...)``.

    Raises:
        ValueError: If the layer was not called with these samples, the outputs are of others, or the scores so far are
            of another kind.
    """
    if layer is None and outputs is None:
        rule.take_source("losses")
        return None
    if not losses.requires_grad or not len(losses):
        return SampleNorms()
    if layer is not None:
        rule.take_source("layer")
        return layer.take(losses)
    assert outputs is not None
    rule.take_source("outputs")
    fits = outputs.dim() > 0 and len(outputs) == len(losses) and outputs.requires_grad
    if not fits or not comes_from(losses, outputs):
        without = "" if outputs.requires_grad else " without a gradient"
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)}{without} are not what {len(losses)} losses were computed from: "
            f"give the very tensor that the model returned, shape ({len(losses)}, ...), and no function of it"
        )
    norms = SampleNorms()
    norms.watch_outputs(outputs)
    return norms
