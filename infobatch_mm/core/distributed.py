"""The few collectives that the scores need; no-ops in a single process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


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
