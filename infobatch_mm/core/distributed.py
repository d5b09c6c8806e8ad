"""The few collectives that the scores need; no-ops in a single process."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes, 1 where ``torch.distributed`` is not initialised."""
    return dist.get_world_size() if _initialized() else 1


def rank() -> int:
    """Rank of this process, 0 where ``torch.distributed`` is not initialised."""
    return dist.get_rank() if _initialized() else 0


def all_gather_ragged(tensor: Tensor) -> list[Tensor]:
    """Gather one 1-D CPU tensor per rank; lengths may differ, the dtype must not.

    Args:
        tensor (Tensor): This rank's tensor, shape ``(n_rank,)``, any dtype, on the CPU.

    Returns:
        list[Tensor]: One tensor per rank in rank order, on the CPU, dtype unchanged.
    """
    if world_size() == 1:
        return [tensor]
    # NCCL moves device memory only.
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    length = torch.tensor([tensor.numel()], dtype=torch.int64, device=device)
    lengths = [torch.zeros_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)
    sizes = [int(n) for n in lengths]
    padded = torch.zeros(max(sizes), dtype=tensor.dtype, device=device)
    padded[: tensor.numel()] = tensor.to(device)
    gathered = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return [part[:size].cpu() for part, size in zip(gathered, sizes, strict=True)]


def gather(value: T) -> list[T]:
    """Everyone's value, in the order of the ranks; every process must call it.

    Args:
        value: Anything that can be pickled.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


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


def require_equal(**values: Any) -> None:
    """Refuse to go on where processes differ in what must be one; every process must call it.

    Args:
        values: What to compare, by name; plain values with a ``repr``.

    Raises:
        ValueError: On every process, with the values of rank 0 and of the first rank that differs.
    """
    if world_size() == 1:
        return
    everyones = gather({name: repr(value) for name, value in values.items()})
    for other, theirs in enumerate(everyones):
        for name, value in everyones[0].items():
            if theirs[name] != value:
                raise ValueError(
                    f"the processes differ: rank 0 has {name}={value}, rank {other} has {name}={theirs[name]}; all "
                    "of them must draw the same plans: give them the same data set, in the same order, and settings"
                )
