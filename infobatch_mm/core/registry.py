"""Names of classes that users and the package register."""

from __future__ import annotations

from typing import Any


def claim(registry: dict[str, Any], name: str, cls: type) -> None:
    """Put a class down under a name; made once more, as in a notebook, it takes its own earlier place.

    Raises:
        ValueError: If another class has the name.
    """
    there = registry.get(name, cls)
    if _place(there) != _place(cls):
        raise ValueError(f"the name {name!r} of {_place(cls)} is taken by {_place(there)}: use another")
    registry[name] = cls


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
