"""What is asked of the plans that a user's own policy draws."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .plan import Plan
from .policy import PruningPolicy
from .policy_registry import is_ours


def check_drawn(plan: Any, policy: PruningPolicy, num_samples: int, multiple_of: int) -> None:
    """Refuse a plan that a policy of a user's own draws wrongly. Ours are right by construction, and pay nothing.

    Args:
        plan: What :meth:`PruningPolicy.draw` returned.
        policy (PruningPolicy): Whose.
        num_samples (int): Size N of the data set.
        multiple_of (int): What the number of visits of a pruned pass must be a multiple of.

    Raises:
        ValueError: With the policy, what was found, and what was expected.
    """
    if plan is None or is_ours(policy):
        return
    if (fault := _fault(plan, num_samples, multiple_of)) is not None:
        raise ValueError(
            f"policy {policy.name!r} ({type(policy).__qualname__}) drew a plan that cannot be walked: {fault}"
        )


def _fault(plan: Any, num_samples: int, multiple_of: int) -> str | None:
    if not isinstance(plan, Plan):
        return f"draw() returned a {type(plan).__name__}, expected a Plan or None"
    indices, weights, threshold = plan.indices, plan.weights, plan.threshold
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1 or not len(indices):
        return f"expected int64 sample indices of shape (K,), at least one, got {_described(indices)}"
    if not isinstance(weights, Tensor) or weights.dtype != torch.float32 or weights.shape != indices.shape:
        return f"expected float32 weights of shape {tuple(indices.shape)}, got {_described(weights)}"
    for tensor in (indices, weights):
        if tensor.device.type != "cpu" or tensor.requires_grad:
            return f"expected tensors on the CPU, without a gradient, got {_described(tensor)}"
    if not isinstance(plan.pruned, bool):
        return f"pruned={plan.pruned!r}, expected True or False"
    # It is written to checkpoints and, as JSON, to the summary.
    if threshold is not None and (type(threshold) not in (int, float) or not math.isfinite(threshold)):
        return f"threshold={threshold!r}, expected a finite float of Python's or None"
    outside = (indices < 0) | (indices >= num_samples)
    if bool(outside.any()):
        return f"sample index {int(indices[outside][0])} is outside the data set of {num_samples} samples"
    visits = torch.bincount(indices, minlength=num_samples)
    if bool((visits > 1).any()):
        return f"sample {int(visits.argmax())} is visited {int(visits.max())} times, expected once at most"
    unusable = ~(torch.isfinite(weights) & (weights > 0))
    if bool(unusable.any()):
        return f"sample {int(indices[unusable][0])} weighs {float(weights[unusable][0])}, expected a positive number"
    if plan.pruned and len(indices) % multiple_of:
        return f"{len(indices)} visits do not make full batches of {multiple_of} (multiple_of)"
    # A host makes as many steps of a full pass as its own sampler would, and losses that do not separate over samples
    # are the host's own there.
    if not plan.pruned and len(indices) < num_samples:
        return f"{len(indices)} of {num_samples} samples are visited, but pruned=False"
    if not plan.pruned and bool((weighed := weights != 1).any()):
        where = int(weighed.nonzero()[0])
        return f"sample {int(indices[where])} weighs {float(weights[where])} in a plan with pruned=False, expected 1"
    return None


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    where = "" if value.device.type == "cpu" else f" on {value.device}"
    return f"{value.dtype} of shape {tuple(value.shape)}{where}{' with a gradient' if value.requires_grad else ''}"
