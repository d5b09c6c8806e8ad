"""What a diffusion model is trained on: noise per image, targets, and the loss of each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..core import rng

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

#: Distinguishes the draws of an evaluation from the draws of any pass.
_HELD_OUT = 2**31


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch: the same for an image and a pass, whichever process trains on it.

    Attributes:
        noise (Tensor): Standard normal, shape ``(B, C, h, w)``, float32, on the CPU.
        timesteps (Tensor): In [0, T), shape ``(B,)``, int64, on the CPU.
    """

    noise: Tensor
    timesteps: Tensor
    _generators: Sequence[torch.Generator]

    @cached_property
    def posterior(self) -> Tensor:
        """More numbers like ``noise``, for first stages with a posterior; drawn only where they are asked for."""
        return torch.stack([_normal(self.noise.shape[1:], each) for each in self._generators])


def draw(
    indices: Sequence[int], shape: Sequence[int], num_timesteps: int, seed: int, pass_index: int, repeat: int = 0
) -> Draws:
    """Draw noise and timesteps of a batch, each image's from a generator of its own.

    They depend on seed, pass and image alone: not on the number of processes, the batch, or where a run was resumed.

    Args:
        indices (Sequence[int]): Sample indices, B of them.
        shape (Sequence[int]): Shape of one latent, ``(C, h, w)``.
        num_timesteps (int): T; timesteps are uniform in [0, T).
        seed (int): Seed of the run, at least 0.
        pass_index (int): Which pass over the data.
        repeat (int): Tells several draws of one image and pass apart. Defaults to 0.

    Returns:
        Draws: Of the batch.
    """
    generators = [rng.generator(seed, pass_index, int(index), repeat) for index in indices]
    here = {"dtype": torch.int64, "device": "cpu"}
    timesteps = torch.stack([torch.randint(num_timesteps, (), generator=each, **here) for each in generators])
    noise = torch.stack([_normal(shape, each) for each in generators])
    return Draws(noise, timesteps, generators)


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    # Fixed dtype and device: under the defaults that a script may have set, the same seed would give other numbers.
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


def in_part(timesteps: Tensor, part: int, parts: int, num_timesteps: int) -> Tensor:
    """Bring timesteps of the whole schedule into one of its equal parts.

    Args:
        timesteps (Tensor): Uniform in [0, T), shape ``(B,)``, int64.
        part (int): Which part, from 0.
        parts (int): How many.
        num_timesteps (int): T.

    Returns:
        Tensor: Of the same shape and dtype, uniform in that part.
    """
    return (timesteps + part * num_timesteps) // parts


def log_snr(scheduler: Any, timesteps: Tensor) -> Tensor:
    """Logarithm of the signal-to-noise ratio of noisy images: their noise level, for ``score='timestep'``.

    Args:
        scheduler (SchedulerMixin): A noise scheduler of diffusers: one with ``alphas_cumprod``, as ``DDPMScheduler``
            has them, or of flow matching, whose timesteps are sigma x ``num_train_timesteps``.
        timesteps (Tensor): Shape ``(B,)``, as the scheduler's.

    Returns:
        Tensor: Shape ``(B,)``, float32, on the timesteps' device: log(alpha_bar / (1 - alpha_bar)), or
        2 log((1 - sigma) / sigma); infinite where there is nothing but the image, or nothing but noise.

    Raises:
        ValueError: For a scheduler of another kind, or timesteps that are not the scheduler's.
    """
    name = type(scheduler).__name__
    if isinstance(scheduler, Tensor) or not isinstance(timesteps, Tensor):
        raise ValueError(f"log_snr({name}, {type(timesteps).__name__}): give it the scheduler, then the timesteps")
    if hasattr(scheduler, "alphas_cumprod"):
        if timesteps.is_floating_point():
            raise ValueError(
                f"{name} with timesteps in {timesteps.dtype}: give it the whole timesteps that the noise was drawn "
                "for, or, where noise levels are sigmas, pass log_snr=-2 * sigma.log() to weigh() yourself"
            )
        return compute_snr(scheduler, timesteps).log().float()
    if "FlowMatch" not in name:
        raise ValueError(
            f"{name} has no alphas_cumprod and is none of flow matching, so that its noise levels are not known here: "
            "pass log_snr to weigh() yourself, -2 * sigma.log() where images have variance 1"
        )
    # (T - t) / t in place of (1 - sigma) / sigma: exact enough in float32, which all devices have.
    noisy = timesteps.float()
    return 2 * torch.log((scheduler.config.num_train_timesteps - noisy) / noisy)


class Denoising:
    """The denoising objective of a noise scheduler, image by image.

    Args:
        scheduler (DDPMScheduler): Its ``prediction_type`` says what the model predicts: ``'epsilon'`` the noise
            (Ho et al., NeurIPS 2020, eq. 14), ``'v_prediction'`` the velocity (Salimans and Ho, ICLR 2022), or
            ``'sample'`` the latent itself, whose loss is weighted by the signal-to-noise ratio as diffusers does
            (Salimans and Ho, section 4).
        snr_gamma (float, optional): Gamma of Min-SNR weighting (Hang et al., ICCV 2023), positive; the authors use 5.
            Defaults to None: no such weighting.

    Raises:
        ValueError: If the scheduler's prediction type or gamma is none of these.
    """

    def __init__(self, scheduler: DDPMScheduler, snr_gamma: float | None = None) -> None:
        self.scheduler = scheduler
        self.prediction_type = scheduler.config.prediction_type
        self.snr_gamma = snr_gamma
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type={self.prediction_type!r}: choose one of {PREDICTION_TYPES}")
        if snr_gamma is not None and not snr_gamma > 0:
            raise ValueError(f"snr_gamma={snr_gamma!r} is not positive: use 5, or leave it out")

    def losses(
        self, model: Callable[[Tensor, Tensor], Tensor], latents: Tensor, noise: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss of each image, and the score that it is ranked by.

        Args:
            model (Callable): From noisy latents ``(B, C, h, w)`` and timesteps ``(B,)`` to predictions
                ``(B, C, h, w)``.
            latents (Tensor): Clean latents, shape ``(B, C, h, w)``, float.
            noise (Tensor): Of the same shape.
            timesteps (Tensor): Shape ``(B,)``, int64.

        Returns:
            tuple[Tensor, Tensor]: Losses, shape ``(B,)``, float32, whose mean is the loss that diffusers' examples
            train on; and the same without Min-SNR weighting, detached.
        """
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        predicted = model(noisy, timesteps).float()
        squared = F.mse_loss(predicted, self.target(latents, noise, timesteps).float(), reduction="none")
        losses = squared.flatten(1).mean(1)
        if self.prediction_type != "sample" and self.snr_gamma is None:
            return losses, losses.detach()
        snr = compute_snr(self.scheduler, timesteps)
        unclipped = losses * snr if self.prediction_type == "sample" else losses
        if self.snr_gamma is None:
            return unclipped, unclipped.detach()
        # min(SNR, gamma) of the loss of the latent itself, in terms of what is predicted (Hang et al., section 3.4).
        per_latent = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[self.prediction_type]
        return losses * (snr.clamp(max=self.snr_gamma) / per_latent), unclipped.detach()

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model is to predict, shape ``(B, C, h, w)``."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        return latents


def predictor(unet: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Wrap a UNet of diffusers as the function that :meth:`Denoising.losses` takes.

    Args:
        unet (UNet2DModel): The model, or what accelerate has made of it.

    Returns:
        Callable: From noisy latents ``(B, C, h, w)`` and timesteps ``(B,)`` to predictions ``(B, C, h, w)``.
    """
    return lambda noisy, timesteps: unet(noisy, timesteps).sample


@torch.no_grad()
def losses_over_timesteps(
    denoising: Denoising,
    model: Callable[[Tensor, Tensor], Tensor],
    latents: Sequence[dict[str, Tensor]] | Dataset,
    device: torch.device,
    batch_size: int = 64,
    draws_per_image: int = 8,
) -> Tensor:
    """Loss of each image at timesteps spread over the whole schedule, without Min-SNR weighting.

    Noise and timesteps are the same at every call, and none that a training sees.

    Args:
        denoising (Denoising): The objective.
        model (Callable): As in :meth:`Denoising.losses`.
        latents (Dataset): N items with ``latents``, shape ``(C, h, w)``.
        device (torch.device): The model's.
        batch_size (int): Images at once. Defaults to 64.
        draws_per_image (int): Timesteps at which each image is seen, one in each of as many equal parts of the
            schedule. Defaults to 8.

    Returns:
        Tensor: Shape ``(N, draws_per_image)``, float64, on the CPU.
    """
    num_timesteps = denoising.scheduler.config.num_train_timesteps
    rows: list[Tensor] = []
    first = 0
    for batch in DataLoader(latents, batch_size):  # type: ignore[arg-type]
        clean = batch["latents"]
        columns = []
        for repeat in range(draws_per_image):
            drawn = draw(range(first, first + len(clean)), clean.shape[1:], num_timesteps, 0, _HELD_OUT, repeat)
            timesteps = in_part(drawn.timesteps, repeat, draws_per_image, num_timesteps)
            _, losses = denoising.losses(model, clean.to(device), drawn.noise.to(device), timesteps.to(device))
            columns.append(losses.cpu().double())  # not every device has float64
        rows.append(torch.stack(columns, dim=1))
        first += len(clean)
    return torch.cat(rows)


def held_out_loss(
    denoising: Denoising,
    model: Callable[[Tensor, Tensor], Tensor],
    latents: Sequence[dict[str, Tensor]] | Dataset,
    device: torch.device,
    batch_size: int = 64,
    draws_per_image: int = 8,
) -> float:
    """Mean of :func:`losses_over_timesteps` of images that are not trained on: models differ in it by what they know.

    Args:
        denoising, model, latents, device, batch_size, draws_per_image: As there.

    Returns:
        float: The mean over images and draws.
    """
    return float(losses_over_timesteps(denoising, model, latents, device, batch_size, draws_per_image).mean())
