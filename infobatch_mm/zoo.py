"""Where the installed hosts keep their config zoos."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def config_roots(host: str) -> tuple[Path, Path]:
    """Where a host's configs can be: below the package in a wheel, beside the package in a source checkout.

    Args:
        host (str): Import name of the host, which is located, not imported.

    Returns:
        tuple: Both folders; one of them need not exist.

    Raises:
        ValueError: If the host is not installed.
    """
    spec = find_spec(host)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{host} is not installed: pip install 'infobatch_mm[mm]', or the {host} of your choice")
    package = Path(spec.submodule_search_locations[0])
    return package / ".mim" / "configs", package.parent / "configs"


def config_path(host: str, name: str) -> str:
    """Path of a config that a host ships in its wheel, for use as a ``_base_``.

    ``mmseg::name`` does the same, but only where the distribution is called mmsegmentation: not on the
    maintained forks. The host is located, not imported.

    Args:
        host (str): Import name of the host, e.g. ``'mmseg'``.
        name (str): Path below its ``configs`` folder.

    Returns:
        str: Absolute path.

    Raises:
        ValueError: If the host is not installed or ships no such config.

    Example:
        >>> _base_ = [__import__('infobatch_mm.zoo').zoo.config_path('mmseg', '_base_/models/upernet_r50.py')]
    """
    wheel, checkout = config_roots(host)
    for path in (wheel / name, checkout / name):
        if path.is_file():
            return str(path)
    raise ValueError(f"{host} at {wheel.parents[1]} ships no config {name!r}")
