"""Norms of samples' gradients in a step of a host: watched in the forward pass, known after the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .dissect.results import losses_in
from .weigher import LossWeigher


def watch_outputs(weigher: LossWeigher, arguments: Any) -> None:
    """Watch the gradient that comes back to what a scored loss was given, where no last layer is watched."""
    batch = weigher.batch
    if batch.norms is None or batch.norms_of == "layer" or not torch.is_grad_enabled():
        return
    for tensor in _tensors(arguments):
        if tensor.requires_grad and tensor.dim() > 0 and len(tensor) == batch.size == batch.rows.number:
            batch.norms.watch_outputs(tensor)
            batch.norms_of = "outputs"


def expect_norms(weigher: LossWeigher, losses: Any) -> None:
    """Learn from the losses that a model returns what their backward pass begins from."""
    batch = weigher.batch
    trained = [loss for _, loss in losses_in(losses) if loss.requires_grad]
    if batch.norms is None or not batch.norms_of or not trained:
        return
    # All losses are added up: the gradient of one is the scale of all.
    weights = batch.rows.weights_on(trained[0].device).detach()
    batch.norms.expect(torch.zeros_like(weights), weights / len(weights), trained[0])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
