"""The elements of a loss, added up or counted for each sample."""

from __future__ import annotations

import torch
from torch import Tensor


def samplewise_sum(elementwise: Tensor) -> Tensor:
    """Sum over all but the first dimension, shape ``(B,)``, at least float32: half precision overflows."""
    dtype = torch.promote_types(elementwise.dtype, torch.float32)
    return elementwise.flatten(1).sum(1, dtype=dtype) if elementwise.dim() > 1 else elementwise.to(dtype)


def valid_per_sample(mask: Tensor) -> Tensor:
    """Number of valid elements of each sample, shape ``(B,)``, int64."""
    return torch.count_nonzero(mask.flatten(1), dim=1) if mask.dim() > 1 else mask.long()
