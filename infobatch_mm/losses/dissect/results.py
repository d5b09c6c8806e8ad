"""Losses in what a host's head or model returns: a tensor, or dicts and lists of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from .arguments import like


def losses_in(result: Any, path: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    """Path and value of what the host optimises: floating tensors, in dicts those with 'loss' in their key."""
    if isinstance(result, Tensor):
        names = [key for key in path if isinstance(key, str)]
        if result.is_floating_point() and (not names or "loss" in names[-1]):
            yield path, result
    elif isinstance(result, dict):
        for key, value in result.items():
            yield from losses_in(value, (*path, key))
    elif isinstance(result, (list, tuple)):
        for i, value in enumerate(result):
            yield from losses_in(value, (*path, i))


def loss_at(result: Any, path: tuple) -> Tensor:
    """The loss at a path of :func:`losses_in`."""
    for key in path:
        result = result[key]
    return result


def replace_losses(result: Any, losses: Mapping[tuple, Tensor], path: tuple = ()) -> Any:
    """The same result with other losses at some paths of :func:`losses_in`."""
    if path in losses:
        return losses[path]
    if isinstance(result, dict):
        return type(result)({key: replace_losses(value, losses, (*path, key)) for key, value in result.items()})
    if isinstance(result, (list, tuple)):
        return like(result, [replace_losses(value, losses, (*path, i)) for i, value in enumerate(result)])
    return result


def written(path: tuple) -> str:
    """A path of :func:`losses_in`, for messages."""
    return ".".join(str(key) for key in path) or "its loss"
