"""Proofs, in the first step, that a loss nobody vouches for can be weighed by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import rng
from .batch import BatchedArguments
from .results import losses_in
from .weigher import HOW_TO


def check_order(title: str, data_samples: Sequence[Any] | None, arguments: Iterable[Any]) -> None:
    """Refuse a head that is given the model's data samples in another order than the batch's.

    Args:
        title (str): The head's name.
        data_samples (Sequence, optional): The model's, in the order of the weights; None if it has none.
        arguments (Iterable): What the head was called with.

    Raises:
        ValueError: If a list among the arguments holds the same objects in another order.
    """
    if data_samples is None:
        return
    expected = [id(sample) for sample in data_samples]
    for value in arguments:
        given = [id(each) for each in value] if isinstance(value, (list, tuple)) else []
        if given and given != expected and set(given) <= set(expected):
            raise ValueError(
                f"{title} cannot be weighed: it is given {len(given)} of the {len(expected)} data samples of the "
                f"batch, or in another order: expected all in the order of the batch; {HOW_TO}"
            )


def prove_samples_alike(call: Callable[[Mapping[str, Any]], Any], batch: BatchedArguments, title: str) -> bool:
    """Refuse a loss that tells samples apart by their place in the batch, or leaves some of them out.

    Args:
        call (Callable): Evaluates the host's loss on arguments.
        batch (BatchedArguments): The arguments of one call.
        title (str): The loss's name.

    Returns:
        bool: Whether the batch could prove anything: one of a single sample cannot.

    Raises:
        ValueError: With what was found.
    """
    if batch.batch_size == 1:
        return False
    if batch.has_rows:
        return True  # cannot be put into another order
    _check_order_is_free(call, batch, title)
    _check_all_samples_count(call, batch, title)
    return True


def _check_order_is_free(call: Callable, batch: BatchedArguments, title: str) -> None:
    same = list(range(batch.batch_size))
    # Two samples in the other order are a flip, which a head that flips does not notice: take one twice.
    orders = (same, [*same[1:], 0]) if batch.batch_size > 2 else ([0, 1, 1], [1, 0, 1])
    state = rng.capture()
    with torch.no_grad():
        total, again = (_total(call(batch.reordered(same))) for _ in range(2))
        if total is None or again is None or not _equal(total, again, 0):
            return  # it draws random numbers: another order of samples is another draw
        rng.restore(state)
        try:
            total, other = (_total(call(batch.reordered(order))) for order in orders)
        except (RuntimeError, IndexError, ValueError, AssertionError):
            if batch.batch_size > 2:
                raise
            return  # it knows its batch has two
    if total is None or other is None or not _equal(total, other, 100 * torch.finfo(total.dtype).eps):
        first, second = ("none" if each is None else f"{float(each):.6g}" for each in (total, other))
        raise ValueError(
            f"{title} cannot be weighed: its loss is {first}, but {second} for the same samples in another order; it "
            f"drops, reorders or mixes samples: expected a loss that treats the samples of a batch alike; {HOW_TO}"
        )


def _check_all_samples_count(call: Callable, batch: BatchedArguments, title: str) -> None:
    predictions = batch.predictions()
    with torch.enable_grad():
        together = _gradient_norms(call(batch.reordered(list(range(batch.batch_size)))), predictions, batch.batch_size)
        for i, arguments in enumerate(batch.samples()):
            if float(together[i]) > 0:
                continue
            alone = _gradient_norms(call(arguments), predictions, batch.batch_size)
            if float(alone[i]) > 0:
                raise ValueError(
                    f"{title} cannot be weighed: sample {i} of {batch.batch_size} has a loss of its own, but no part "
                    f"in the loss of the batch: expected every sample to count; {HOW_TO}"
                )


def _gradient_norms(result: Any, predictions: list[tuple[Tensor, int]], batch_size: int) -> Tensor:
    """How much the loss depends on the predictions of each sample, shape ``(B,)``."""
    total = _total(result)
    norms = torch.zeros(batch_size)
    if total is None or not total.requires_grad:
        return norms
    tensors = [tensor for tensor, _ in predictions]
    gradients = torch.autograd.grad(total, tensors, retain_graph=True, allow_unused=True)
    for gradient, (_, axis) in zip(gradients, predictions, strict=True):
        if gradient is not None:
            norms += gradient.movedim(axis, 0).flatten(1).abs().sum(1).float().cpu()
    return norms


def _total(result: Any) -> Tensor | None:
    losses = [loss.sum() / max(loss.numel(), 1) for _, loss in losses_in(result)]
    return sum(losses[1:], losses[0]) if losses else None


def _equal(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool(torch.isclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True))
