"""Latent diffusion: images, first stages, latents, denoising losses, evaluation."""

from ..accelerated import AcceleratedInfoBatch  # where scripts have always found it

__all__ = ["AcceleratedInfoBatch"]
