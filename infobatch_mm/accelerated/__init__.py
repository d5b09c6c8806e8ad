"""Pruned training in scripts on accelerate."""

try:
    import accelerate  # noqa: F401
except ImportError as error:
    raise ImportError(
        "infobatch_mm.accelerated needs accelerate: pip install 'infobatch_mm[diffusers]', or any from 1.0 on"
    ) from error

from .infobatch import AcceleratedInfoBatch

__all__ = ["AcceleratedInfoBatch"]
