"""Tensors on the way between devices."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for it; on the CPU it has arrived, as it may be read there at once."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def on_cpu(tensor: Tensor) -> bool:
    """Whether a look at the tensor costs nothing; anywhere else it makes a step wait."""
    return tensor.device.type == "cpu"
