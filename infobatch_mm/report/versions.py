"""Versions of the packages that a comparison was made with."""

from __future__ import annotations

import platform
from importlib import metadata

#: Distributions whose versions decide what a training computes; hosts also under the names of their forks.
_PACKAGES = (
    *("infobatch_mm", "torch", "torchvision", "numpy", "scipy"),
    *(f"{fork}{name}" for name in ("mmengine", "mmcv", "mmsegmentation", "mmpretrain") for fork in ("", "onedl-")),
    *("diffusers", "accelerate"),
)


def installed() -> dict[str, str]:
    """Version of Python, and of each of these packages that is installed, by name."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
