"""What the processes of a run tell each other before it trains."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

from ..core.distributed import world_size

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """Everyone's value, in the order of the ranks; every process must call it.

    Args:
        value: Anything that can be pickled.
    """
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def raise_together(error: str | None) -> None:
    """Refuse on every process what one of them found wrong, so that none is left waiting; every process must call it.

    Args:
        error (str, optional): What this process found wrong.

    Raises:
        ValueError: On every process, with the error of the first that has one.
    """
    for found in gather(error):
        if found is not None:
            raise ValueError(found)
