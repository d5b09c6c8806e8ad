"""Pruned training on accelerate and diffusers."""

try:
    import accelerate  # noqa: F401
except ImportError as error:
    raise ImportError(
        "infobatch_mm.diffusion needs accelerate: pip install 'infobatch_mm[diffusers]', or any accelerate from 1.0 on"
    ) from error

from .accelerated import AcceleratedInfoBatch

__all__ = ["AcceleratedInfoBatch"]
