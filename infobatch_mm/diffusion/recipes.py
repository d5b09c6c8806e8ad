"""Recipes: YAML files that set options of a training, and may be built on each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the options of a recipe.

    Args:
        path (Path): A YAML file. Where it names another as ``_base_``, relative to its own folder, it is built on it:
            its options win.

    Returns:
        dict[str, Any]: Values by the names of options.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If one is no mapping.
        yaml.YAMLError: If one is no YAML.
    """
    options = yaml.safe_load(path.read_text())
    if not isinstance(options, dict):
        raise ValueError("it must be a mapping of options, such as `resolution: 256`")
    base = options.pop("_base_", None)
    return options if base is None else {**read_recipe(path.parent / base), **options}


def as_flags(options: dict[str, Any]) -> list[str]:
    """Write options as the command line has them, so that one parser checks both.

    Args:
        options (dict[str, Any]): Values by the names of options. None leaves the default.

    Returns:
        list[str]: ``--name=value``, ``--name`` or ``--no-name``; mappings as JSON.
    """
    flags: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags
