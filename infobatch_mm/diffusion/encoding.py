"""Encode images with the first stage: a batch to train on, or images without chance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .denoising import Draws
from .first_stage import FirstStage, moments
from .images import Images


@torch.no_grad()
def to_latents(vae: FirstStage, batch: dict[str, Tensor], drawn: Draws) -> Tensor:
    """Encode a batch, unless it holds latents already.

    Args:
        vae (VQModel | AutoencoderKL): The first stage, on the batch's device.
        batch (dict): ``latents``, shape ``(B, C, h, w)``, or ``pixel_values``, shape ``(B, 3, R, R)``, in [-1, 1].
        drawn (Draws): The batch's draws: noise of the posterior comes from them, where the first stage has one.

    Returns:
        Tensor: Scaled latents, shape ``(B, C, h, w)``, without gradient.
    """
    if "latents" in batch:
        return batch["latents"]
    mean, std = moments(vae, batch["pixel_values"])
    return mean if std is None else mean + std * drawn.posterior.to(mean.device)


def warn_of_scale(vae: FirstStage, images: Images) -> None:
    """Print a line if latents are far from the unit variance that the noise schedule is made for.

    Args:
        vae (VQModel | AutoencoderKL): The first stage.
        images (Images): The images to train on; about 16 of them are encoded.
    """
    spread = float(encoded(vae, images, range(0, len(images), math.ceil(len(images) / 16))).std())
    if not 0.5 < spread < 2:
        print(
            f"the latents have a standard deviation of {spread:.2f}, and noise one of 1: with a scaling_factor of "
            f"{vae.config.scaling_factor / spread:.4g} in the config of the first stage, not "
            f"{vae.config.scaling_factor:.4g}, it would be 1"
        )


@torch.no_grad()
def encoded(vae: FirstStage, images: Images, indices: Sequence[int]) -> Tensor:
    """Encode some images without chance: the middle of each, and the mean of the posterior.

    Args:
        vae (VQModel | AutoencoderKL): The first stage, on any device.
        images (Images): The images.
        indices (Sequence[int]): Which of them, N.

    Returns:
        Tensor: Scaled latents, shape ``(N, C, h, w)``, on the first stage's device.
    """
    pixels = torch.stack([images.fixed(index) for index in indices])
    return moments(vae, pixels.to(next(vae.parameters()).device))[0]


def all_encoded(vae: FirstStage, images: Images, batch_size: int) -> list[dict[str, Tensor]]:
    """Encode all images as :func:`encoded` does, for :func:`.held_out_loss`.

    Args:
        vae (VQModel | AutoencoderKL): The first stage, on any device.
        images (Images): The images, N of them.
        batch_size (int): Images encoded at once.

    Returns:
        list[dict[str, Tensor]]: N items with ``latents``, shape ``(C, h, w)``, on the CPU.
    """
    parts = torch.arange(len(images)).split(batch_size)
    return [{"latents": each} for part in parts for each in encoded(vae, images, part.tolist()).cpu()]
