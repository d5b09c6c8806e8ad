"""Policies by name, also a user's own, and what is asked of the plans that they draw."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from .annealed import AnnealedPolicy, check_delta, check_ratio
from .policy import PruningPolicy
from .registry import claim

P = TypeVar("P", bound=type[PruningPolicy])

_POLICIES: dict[str, type[PruningPolicy]] = {}


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
    if lacking := _lacking(policy):
        raise ValueError(f"{policy.__qualname__} is abstract: it lacks {lacking}")
    claim(_POLICIES, _checked_name(policy), policy)
    return policy


def registered() -> dict[str, type[PruningPolicy]]:
    """All policies by name, also users' own."""
    return dict(_POLICIES)


def build_policy(
    policy: str | Mapping[str, Any] | PruningPolicy = "infobatch",
    prune_ratio: float | None = None,
    delta: float | None = None,
    quantile: float | None = None,
) -> PruningPolicy:
    """Turn the user's choice into a policy.

    Args:
        policy (str | dict | PruningPolicy): ``'infobatch'``, ``'random'``, ``'none'`` or the name of a registered one;
            ``dict(type=name, ...)`` with arguments of its own; or an instance. In place of the name, also a class or
            where it can be imported from, ``'module.Class'``. Defaults to ``'infobatch'``.
        prune_ratio (float, optional): r in [0, 1), for policies that take it; see :class:`.AnnealedPolicy`. Defaults to
            the policy's own, 0.5 for most.
        delta (float, optional): In (0, 1], for policies that take it; see :class:`.AnnealedPolicy`. Defaults to the
            policy's own, 0.875 for most.
        quantile (float, optional): Of ``'infobatch'``; see :class:`.InfoBatchPolicy`. Not looked at by the others.

    Returns:
        PruningPolicy: The policy.

    Raises:
        ValueError: For an unknown name or argument, an argument out of range, something that is no policy, or a policy
            whose name or settings cannot be written down.
    """
    if prune_ratio is not None:
        check_ratio(prune_ratio)  # arguments out of range are refused whatever the policy
    if delta is not None:
        check_delta(delta)
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
    defaults: dict[str, Any] = dict(prune_ratio=prune_ratio, delta=delta, quantile=quantile)
    # What differs from the usual was meant.
    for key, usual in (("prune_ratio", 0.5), ("delta", 0.875)):
        if defaults[key] not in (None, usual, given.get(key, defaults[key])):
            raise ValueError(
                f"{key}={defaults[key]!r} and policy=dict({key}={given[key]!r}, ...): set it in one of them"
            )
        if defaults[key] not in (None, usual) and key not in parameters and not _is_packaged(cls):
            raise ValueError(f"policy {name!r} takes no {key}: its arguments are {list(parameters)}")
        if defaults[key] is None and key in parameters and parameters[key].default is inspect.Parameter.empty:
            defaults[key] = usual
    taken = {key: value for key, value in defaults.items() if key in parameters and value is not None}
    if unknown := [] if open_ended else [key for key in given if key not in parameters]:
        raise ValueError(f"policy {name!r} takes no {unknown[0]}: its arguments are {list(parameters)}")
    arguments = {**taken, **given}
    if missing := [key for key, each in parameters.items() if each.default is each.empty and key not in arguments]:
        raise ValueError(f"policy {name!r} needs {missing[0]}: use dict(type={name!r}, {missing[0]}=...)")
    if lacking := _lacking(cls):
        raise ValueError(f"policy {name!r} ({cls.__qualname__}) is abstract: it lacks {lacking}")
    try:
        built = cls(**arguments)
    except TypeError as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ValueError(f"policy {name!r} cannot be made by {cls.__qualname__}({shown}): {error}") from error
    return _checked(built)


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


def _lacking(policy: type[PruningPolicy]) -> str:
    """Methods that a policy has yet to write; '' where there are none."""
    lacking = sorted(getattr(policy, "__abstractmethods__", ()))
    if policy.draw is PruningPolicy.draw and policy.chances is PruningPolicy.chances:
        lacking.append("chances, or draw")
    if (
        issubclass(policy, AnnealedPolicy)
        and (policy.draw, policy.chances) == (PruningPolicy.draw, AnnealedPolicy.chances)
        and policy.chances_at is AnnealedPolicy.chances_at
    ):
        lacking.append("chances_at, chances, or draw")
    return ", ".join(lacking)


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
