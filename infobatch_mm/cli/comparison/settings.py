"""Settings as they stand in files: compared, and shown with both values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

#: So many differences are named in a message.
_NAMED = 6


def as_plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back, equal only where the settings are.

    Lists for tuples, texts for keys, names for classes and functions, ``'inf'`` for infinity, and for an instance its
    attributes, or what it says of itself without its place in memory.
    """
    return json.loads(json.dumps(_plain(settings, ())))


def _plain(value: Any, around: tuple[int, ...]) -> Any:
    """A value without what JSON does not know; ``around`` are the ids of what it lies in."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if id(value) in around:
        return "..."
    around = (*around, id(value))
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): _plain(each, around) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each, around) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(each, around) for each in value), key=repr)
    if (name := getattr(value, "__qualname__", None)) is not None:
        return name
    if type(value).__repr__ is object.__repr__ and hasattr(value, "__dict__"):
        return {"type": type(value).__qualname__, **_plain(vars(value), around)}
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def flat(settings: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, as an override of a config writes them."""
    found: dict[str, Any] = {}
    for key, value in _inside(settings):
        found |= flat(value, f"{name}.{key}" if name else key)
    return found or ({name: settings} if name else {})


def _inside(settings: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(settings, Mapping):
        yield from ((str(key), settings[key]) for key in settings)
    elif isinstance(settings, (list, tuple)):
        yield from ((str(i), value) for i, value in enumerate(settings))


def differing(one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str]) -> str:
    """Name the settings that differ, with both values.

    Args:
        one (Mapping): Nested settings.
        other (Mapping): Nested settings to compare with.
        names (tuple[str, str]): What each is called in the message.

    Returns:
        str: ``'lr: 0.1 there, 0.2 here; ...'``, six settings at most; '' where the two are equal.
    """
    left, right = flat(one), flat(other)
    keys = [key for key in sorted(left.keys() | right.keys()) if left.get(key) != right.get(key)]
    shown = [f"{key}: {left.get(key)!r} {names[0]}, {right.get(key)!r} {names[1]}" for key in keys[:_NAMED]]
    if len(keys) > _NAMED:
        shown.append(f"and {len(keys) - _NAMED} more")
    return "; ".join(shown)
