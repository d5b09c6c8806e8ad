"""Policies by name, also a user's own, and what is asked of the plans that they draw."""

from __future__ import annotations

import importlib
import inspect
import json
import math
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

    Returns:
        type: The same class.

    Raises:
        ValueError: If it has no name, another class has it, or a method is missing.

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
    if inspect.isabstract(policy):
        lacking = ", ".join(sorted(policy.__abstractmethods__))
        raise ValueError(f"{policy.__qualname__} is abstract: it lacks {lacking}")
    name = _checked_name(policy)
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
            ``dict(type=name, ...)`` with arguments of its own; or an instance. In place of the name, also a class or
            where it can be imported from, ``'module.Class'``. Defaults to ``'infobatch'``.
        prune_ratio (float): r in [0, 1), for policies that take it; see :class:`AnnealedPolicy`. Defaults to 0.5.
        delta (float): In (0, 1], for policies that take it; see :class:`AnnealedPolicy`. Defaults to 0.875.
        quantile (float, optional): Of ``'infobatch'``; see :class:`InfoBatchPolicy`. Not looked at by the others.

    Returns:
        PruningPolicy: The policy.

    Raises:
        ValueError: For an unknown name or argument, an argument out of range, something that is no policy, or a policy
            whose name or settings cannot be written down.
    """
    InfoBatchPolicy(prune_ratio, delta, quantile)  # arguments out of range are refused whatever the policy
    if isinstance(policy, PruningPolicy):
        return _checked(policy)
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
    cls = (_POLICIES.get(name) or _imported(name)) if isinstance(name, str) else name
    if not isinstance(cls, type) or not issubclass(cls, PruningPolicy):
        raise ValueError(
            f"unknown policy {name!r}: choose one of {sorted(_POLICIES)}, pass a PruningPolicy, or decorate yours with "
            "register_policy and have it imported (custom_imports in a config)"
        )
    name = getattr(cls, "name", cls.__qualname__)
    parameters, open_ended = _arguments(cls)
    defaults = dict(prune_ratio=prune_ratio, delta=delta, quantile=quantile)
    # What differs from its default was meant.
    for key, usual in (("prune_ratio", 0.5), ("delta", 0.875)):
        if defaults[key] not in (usual, given.get(key, defaults[key])):
            raise ValueError(
                f"{key}={defaults[key]!r} and policy=dict({key}={given[key]!r}, ...): set it in one of them"
            )
        if defaults[key] != usual and key not in parameters and not _is_packaged(cls):
            raise ValueError(f"policy {name!r} takes no {key}: its arguments are {list(parameters)}")
    taken = {key: value for key, value in defaults.items() if key in parameters and value is not None}
    if unknown := [] if open_ended else [key for key in given if key not in parameters]:
        raise ValueError(f"policy {name!r} takes no {unknown[0]}: its arguments are {list(parameters)}")
    arguments = {**taken, **given}
    if missing := [key for key, each in parameters.items() if each.default is each.empty and key not in arguments]:
        raise ValueError(f"policy {name!r} needs {missing[0]}: use dict(type={name!r}, {missing[0]}=...)")
    try:
        built = cls(**arguments)
    except TypeError as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ValueError(f"policy {name!r} cannot be made by {cls.__qualname__}({shown}): {error}") from error
    return _checked(built)


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


def is_ours(policy: PruningPolicy) -> bool:
    """Whether a policy is of this package, and not of a user's."""
    return _is_packaged(type(policy))


def _is_packaged(cls: type) -> bool:
    return cls.__module__.startswith("infobatch_mm.")


def _checked(policy: PruningPolicy) -> PruningPolicy:
    """A policy whose name and settings go into checkpoints, JSON and configs: found out now, not at the end."""
    if is_ours(policy):
        return policy
    name, settings = _checked_name(type(policy)), policy.settings()
    if type(policy).settings is PruningPolicy.settings and (taken := _arguments(type(policy))[0]):
        raise ValueError(
            f"policy {name!r} ({type(policy).__qualname__}) has arguments {list(taken)} and no settings() of its own: "
            "return them there, with its name under 'policy', so that a run is not resumed with others"
        )
    try:
        json.dumps(settings)
    except (TypeError, ValueError):
        raise ValueError(
            f"policy {name!r} ({type(policy).__qualname__}) has settings() that cannot be written down: {settings!r}; "
            "give numbers, texts, lists and dicts of Python's"
        ) from None
    return policy


def _checked_name(policy: type[PruningPolicy]) -> str:
    name = getattr(policy, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{policy.__qualname__} has name={name!r}: a policy is selected by its name, a text")
    return name


def _imported(place: str) -> Any:
    """What lies at ``module.Class``, as MMEngine writes down a class that a config imports; None for nothing."""
    module, _, name = place.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None) if module else None
    except (ImportError, TypeError, ValueError):  # no such module, or no name of one
        return None


def _arguments(policy: type[PruningPolicy]) -> tuple[dict[str, inspect.Parameter], bool]:
    """What a constructor takes, with what its ``**kwargs`` hands on to its bases; and whether it takes any other."""
    found: dict[str, inspect.Parameter] = {}
    for base in policy.__mro__:
        if base is object or "__init__" not in vars(base):
            continue
        own = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
        named = {each.name: each for each in own if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
        found = {**found, **{key: each for key, each in named.items() if key not in found}}
        if not any(each.kind is each.VAR_KEYWORD for each in own):
            return found, False
    # The last constructor takes what it likes, or there is none at all.
    return found, any("__init__" in vars(base) for base in policy.__mro__[:-1])


def _place(policy: type) -> str:
    return f"{policy.__module__}.{policy.__qualname__}"
