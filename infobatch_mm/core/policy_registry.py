"""Policies by name, also a user's own, and what is asked of the plans that they draw."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from .plan import Plan
from .policies import InfoBatchPolicy, NoPruning, PruningPolicy, RandomPolicy

P = TypeVar("P", bound=type[PruningPolicy])

_POLICIES: dict[str, type[PruningPolicy]] = {p.name: p for p in (InfoBatchPolicy, RandomPolicy, NoPruning)}


def register_policy(policy: P) -> P:
    """Make a policy of a user's own known by its ``name``, so that configs can name it; decorates the class.

    Args:
        policy (type): The class. Registered again, as in a notebook, it takes its own earlier place.

    Raises:
        ValueError: If it has no name, or another class has it.

    Example:
        >>> @register_policy
        ... class EveryOther(PruningPolicy):
        ...     name = "every_other"
        ...     def is_active(self, progress):
        ...         return True
        ...     def draw(self, scores, seen, generator, multiple_of):
        ...         kept = torch.randperm(len(scores), generator=generator)[: len(scores) // 2]
        ...         return Plan(kept, torch.full((len(kept),), 2.0), pruned=True)
        >>> build_policy("every_other").name
        'every_other'
    """
    if not isinstance(policy, type) or not issubclass(policy, PruningPolicy):
        raise ValueError(f"register_policy takes a subclass of PruningPolicy, got {policy!r}")
    name = getattr(policy, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{policy.__qualname__} has name={name!r}: a policy is selected by its name, a text")
    there = _POLICIES.get(name, policy)
    if _place(there) != _place(policy):
        raise ValueError(f"the name {name!r} of {_place(policy)} is taken by {_place(there)}: use another")
    _POLICIES[name] = policy
    return policy


def build_policy(
    policy: str | Mapping[str, Any] | PruningPolicy = InfoBatchPolicy.name,
    prune_ratio: float = 0.5,
    delta: float = 0.875,
    quantile: float | None = None,
) -> PruningPolicy:
    """Turn the user's choice into a policy.

    Args:
        policy (str | dict | PruningPolicy): ``'infobatch'``, ``'random'``, ``'none'`` or the name of a registered one;
            ``dict(type=name, ...)`` with arguments of its own, also with a class in place of the name; or an instance.
            Defaults to ``'infobatch'``.
        prune_ratio (float): r in [0, 1), for policies that take it; see :class:`AnnealedPolicy`. Defaults to 0.5.
        delta (float): In (0, 1], for policies that take it; see :class:`AnnealedPolicy`. Defaults to 0.875.
        quantile (float, optional): Of ``'infobatch'``; see :class:`InfoBatchPolicy`. Not looked at by the others.

    Returns:
        PruningPolicy: The policy.

    Raises:
        ValueError: For an unknown name or argument, an argument out of range, or something that is no policy.
    """
    InfoBatchPolicy(prune_ratio, delta, quantile)  # arguments out of range are refused whatever the policy
    if isinstance(policy, PruningPolicy):
        return policy
    if isinstance(policy, type) and issubclass(policy, PruningPolicy):
        raise ValueError(
            f"policy={policy.__qualname__} is a class: make an instance of it, or decorate it with register_policy and "
            f"use policy={getattr(policy, 'name', None)!r}"
        )
    given: dict[str, Any] = {"type": policy} if isinstance(policy, str) else {}
    if isinstance(policy, Mapping):
        given = {key: policy[key] for key in policy}  # a config of MMEngine imports what it names when it is asked
    if "type" not in given:
        raise ValueError(
            f"policy={policy!r} is no policy: use a name, one of {sorted(_POLICIES)}, dict(type=name, ...), or an "
            "instance of PruningPolicy"
        )
    name = given.pop("type")
    if isinstance(name, type) and issubclass(name, PruningPolicy):
        cls = name
    elif isinstance(name, str) and name in _POLICIES:
        cls = _POLICIES[name]
    else:
        raise ValueError(
            f"unknown policy {name!r}: choose one of {sorted(_POLICIES)}, pass a PruningPolicy, or decorate yours with "
            "register_policy and have it imported (custom_imports in a config)"
        )
    name = cls.name
    parameters = inspect.signature(cls).parameters
    defaults = dict(prune_ratio=prune_ratio, delta=delta, quantile=quantile)
    taken = {key: value for key, value in defaults.items() if key in parameters and value is not None}
    open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    if unknown := [] if open_ended else [key for key in given if key not in parameters]:
        raise ValueError(f"policy {name!r} takes no {unknown[0]}: its arguments are {list(parameters)}")
    arguments = {**taken, **given}
    named = [each for each in parameters.values() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    if missing := [each.name for each in named if each.default is each.empty and each.name not in arguments]:
        raise ValueError(f"policy {name!r} needs {missing[0]}: use dict(type={name!r}, {missing[0]}=...)")
    return cls(**arguments)


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
    if plan is None or type(policy).__module__.startswith("infobatch_mm."):
        return
    if (fault := _fault(plan, num_samples, multiple_of)) is not None:
        raise ValueError(
            f"policy {policy.name!r} ({type(policy).__qualname__}) drew a plan that cannot be walked: {fault}"
        )


def _fault(plan: Any, num_samples: int, multiple_of: int) -> str | None:
    if not isinstance(plan, Plan):
        return f"draw() returned a {type(plan).__name__}, expected a Plan or None"
    indices, weights = plan.indices, plan.weights
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1 or not len(indices):
        return f"expected int64 sample indices of shape (K,), at least one, got {_described(indices)}"
    if not isinstance(weights, Tensor) or weights.dtype != torch.float32 or weights.shape != indices.shape:
        return f"expected float32 weights of shape {tuple(indices.shape)}, got {_described(weights)}"
    if not isinstance(plan.pruned, bool):
        return f"pruned={plan.pruned!r}, expected True or False"
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
    return None


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _place(policy: type) -> str:
    return f"{policy.__module__}.{policy.__qualname__}"
