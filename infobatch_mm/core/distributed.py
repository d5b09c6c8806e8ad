"""The few collectives that the scores need; no-ops in a single process.

``group`` is the process group among which the data is shared, None for all processes: with tensor or pipeline
parallelism several processes see the same samples, and only one of them belongs to it.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
#: A ``torch.distributed.ProcessGroup``, or None for all processes.
Group = Any


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size(group: Group = None) -> int:
    """Number of processes, 1 where ``torch.distributed`` is not initialised."""
    return dist.get_world_size(group) if _initialized() else 1


def rank(group: Group = None) -> int:
    """Rank of this process, 0 where ``torch.distributed`` is not initialised."""
    return dist.get_rank(group) if _initialized() else 0


def device_of(group: Group = None) -> torch.device:
    """Where tensors must lie that a group's processes exchange: NCCL, HCCL and XCCL move their device's memory only."""
    # As "cpu:gloo,cuda:nccl": a backend for each device that the group serves.
    served = [each.split(":")[0] for each in str(dist.get_backend_config(group)).split(",")]
    if "cpu" in served:
        return torch.device("cpu")
    return torch.device(served[0], getattr(torch, served[0]).current_device())


def all_gather_ragged(tensor: Tensor, group: Group = None) -> list[Tensor]:
    """Gather one 1-D CPU tensor per rank; lengths may differ, the dtype must not.

    Args:
        tensor (Tensor): This rank's tensor, shape ``(n_rank,)``, any dtype, on the CPU.
        group (ProcessGroup, optional): Among whom. Defaults to all processes.

    Returns:
        list[Tensor]: One tensor per rank in rank order, on the CPU, dtype unchanged.
    """
    if world_size(group) == 1:
        return [tensor]
    device = device_of(group)
    length = torch.tensor([tensor.numel()], dtype=torch.int64, device=device)
    lengths = [torch.zeros_like(length) for _ in range(world_size(group))]
    dist.all_gather(lengths, length, group)
    sizes = [int(n) for n in lengths]
    padded = torch.zeros(max(sizes), dtype=tensor.dtype, device=device)
    padded[: tensor.numel()] = tensor.to(device)
    gathered = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group)
    return [part[:size].cpu() for part, size in zip(gathered, sizes, strict=True)]


def gather(value: T, group: Group = None) -> list[T]:
    """Everyone's value, in the order of the ranks; every process must call it.

    Args:
        value: Anything that can be pickled.
        group (ProcessGroup, optional): Among whom. Defaults to all processes.
    """
    if world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * world_size(group)
    dist.all_gather_object(values, value, group)
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


def require_equal(group: Group = None, /, **values: Any) -> None:
    """Refuse to go on where processes differ in what must be one; every process must call it.

    Args:
        group (ProcessGroup, optional): Among whom. Defaults to all processes.
        values: What to compare, by name; plain values with a ``repr``.

    Raises:
        ValueError: On every process, with the values of rank 0 and of the first rank that differs.
    """
    if world_size(group) == 1:
        return
    everyones = gather({name: repr(value) for name, value in values.items()}, group)
    for other, theirs in enumerate(everyones):
        for name, value in everyones[0].items():
            if theirs[name] != value:
                raise ValueError(
                    f"the processes differ: rank 0 has {name}={value}, rank {other} has {name}={theirs[name]}; all "
                    "of them must draw the same plans: give them the same data set, in the same order, and settings"
                )
