"""Proofs, in the first step, that a loss nobody vouches for can be weighed by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..refusals import cannot_be_weighed
from .arguments import BatchedArguments
from .results import losses_in


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
            raise cannot_be_weighed(
                title,
                f"it is given {len(given)} of the {len(expected)} data samples of the batch, or in another order: "
                "expected all in the order of the batch",
            )


@contextmanager
def in_full_precision(batch: BatchedArguments) -> Iterator[BatchedArguments]:
    """The arguments of a call, for evaluations without autocast: half precision proves nothing."""
    device_type = batch.device_type
    if not torch.amp.is_autocast_available(device_type):
        yield batch
        return
    if torch.is_autocast_enabled(device_type):
        batch = batch.in_float32()
    with torch.autocast(device_type, enabled=False):
        yield batch


def prove_samples_alike(
    call: Callable[[Mapping[str, Any]], Any],
    batch: BatchedArguments,
    reset: Callable[[], None],
    title: str,
    apart: bool = False,
) -> bool:
    """Refuse a loss that tells samples apart by their place in the batch, or leaves some of them out.

    The number of evaluations depends on the size of the batch alone: on several processes a loss may wait
    for the others' in each.

    Args:
        call (Callable): Evaluates the host's loss on arguments.
        batch (BatchedArguments): The arguments of one call.
        reset (Callable): Puts random generators back to where the call found them.
        title (str): The loss's name.
        apart (bool): Whether to refuse a loss that compares samples with one another, too. Defaults to False.

    Returns:
        bool: Whether the batch could prove anything: one of a single sample cannot.

    Raises:
        ValueError: With what was found.
    """
    if batch.batch_size == 1:
        return False
    if batch.has_rows:
        return True  # cannot be put into another order
    with in_full_precision(batch) as batch:
        draws = _check_order_is_free(call, batch, reset, title)
        if apart and draws:
            raise cannot_be_weighed(
                title,
                "it draws random numbers, so it cannot be seen whether it compares samples with one another",
            )
        _check_part_of_each(call, batch, reset, title, apart)
    return True


def _check_order_is_free(call: Callable, batch: BatchedArguments, reset: Callable, title: str) -> bool:
    """Returns whether the loss draws random numbers: another order of samples is another draw then."""
    size = batch.batch_size
    same = list(range(size))
    # A head that permutes its samples goes unnoticed in an order that commutes with what it does: flips,
    # rotations and swaps do not commute with a rotation of all but the last. Few samples need more.
    pairs = [(same, [*same[1:-1], 0, same[-1]])]
    if size == 3:
        pairs.append((same, [0, 2, 1]))
    elif size == 2:
        pairs = [([0, 1, 1], [1, 0, 1]), ([0, 0, 1, 1], [0, 1, 0, 1])]
    values = []
    with torch.no_grad():
        once = _total(call(batch.reordered(same)))
        again = _total(call(batch.reordered(same)))  # with other random numbers
        for orders in pairs:
            for order in orders:
                reset()
                values.append(_total(call(batch.reordered(order))))
    reset()
    if once is None or again is None:
        return False
    tolerance = 100 * torch.finfo(once.dtype).eps
    if not _equal(once, again, tolerance):
        return True
    for one, other in zip(values[::2], values[1::2], strict=True):
        if one is None or other is None or not _equal(one, other, tolerance):
            first, second = ("none" if each is None else f"{float(each):.6g}" for each in (one, other))
            raise cannot_be_weighed(
                title,
                f"its loss is {first}, but {second} for the same samples in another order; it drops, reorders or "
                "mixes samples: expected a loss that treats the samples of a batch alike",
            )
    return False


def _check_part_of_each(call: Callable, batch: BatchedArguments, reset: Callable, title: str, apart: bool) -> None:
    """Refuse a loss in which a sample has no part.

    With ``apart``, also one whose gradient by a sample's predictions is no multiple of the gradient of its own loss.
    """
    predictions, size = batch.predictions(), batch.batch_size
    judged, compared = False, []
    with torch.enable_grad():
        together = _gradients(call(batch.reordered(list(range(size)))), predictions)
        for i, each in enumerate(batch.samples()):
            alone = _gradients(call(each), predictions)
            own = {path: rows[i] for path, rows in alone.items()}
            part = {path: rows[i] for path, rows in together.items()}
            if any(row.norm() > 0 for row in own.values()) and not any(row.any() for row in part.values()):
                raise cannot_be_weighed(
                    title,
                    f"sample {i} of {size} has a loss of its own, but no part in the loss of the batch: expected every "
                    "sample to count",
                )
            # One without a masked patch may have a loss of 0/0 alone, but not all.
            if apart and all(bool(row.isfinite().all()) for row in own.values()):
                judged = True
                if not all(_parallel(row, own.get(path)) for path, row in part.items()):
                    compared.append(i)
    reset()
    if compared or (apart and not judged):
        raise cannot_be_weighed(
            title,
            f"sample {compared[0] if compared else 0} of {size} has another loss in the batch than alone: it compares "
            "the samples of a batch with one another, or adds means over different numbers of them",
        )


def _parallel(one: Tensor, other: Tensor | None) -> bool:
    norm = float(one.norm())
    return norm == 0 or (other is not None and float(one @ other) >= (1 - 1e-5) * norm * float(other.norm()) > 0)


def _gradients(result: Any, predictions: list[tuple[Tensor, int]]) -> dict[tuple, Tensor]:
    """The gradient of each loss by the predictions of the samples, shape ``(B, ...)``, by its path in the result."""
    gradients, tensors = {}, [tensor for tensor, _ in predictions]
    for path, loss in losses_in(result):
        if loss.requires_grad:
            found = torch.autograd.grad(loss.sum(), tensors, retain_graph=True, allow_unused=True)
            rows = [
                (torch.zeros_like(tensor) if gradient is None else gradient).movedim(axis, 0).flatten(1).float()
                for gradient, (tensor, axis) in zip(found, predictions, strict=True)
            ]
            gradients[path] = torch.cat(rows, dim=1)
    return gradients


def _total(result: Any) -> Tensor | None:
    losses = [loss.sum() / max(loss.numel(), 1) for _, loss in losses_in(result)]
    return sum(losses[1:], losses[0]) if losses else None


def _equal(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool(torch.isclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True))
