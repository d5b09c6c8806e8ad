"""Settings as they stand in files: compared, and shown with both values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

#: So many differences are named in a message.
_NAMED = 6


def as_plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back: lists for tuples, names for classes and functions."""
    return json.loads(json.dumps(settings, default=lambda each: getattr(each, "__qualname__", type(each).__name__)))


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
