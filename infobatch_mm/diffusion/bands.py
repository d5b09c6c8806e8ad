"""The held-out loss by noise level: in equal parts of the noise schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .denoising import log_snr


def loss_by_band(losses: Tensor, scheduler: Any, bands: int) -> list[dict[str, float]]:
    """Average losses over equal parts of the noise schedule.

    Args:
        losses (Tensor): Shape ``(N, D)``, as of :func:`.losses_over_timesteps`: draw d lies in the d-th of D equal
            parts of the schedule. D is a multiple of ``bands``.
        scheduler (DDPMScheduler): The schedule, of T timesteps.
        bands (int): How many parts, B.

    Returns:
        list[dict[str, float]]: From little noise to much: ``first_timestep`` and ``last_timestep``, both included
        (where T does not divide by D, bands may share the timestep between them), ``log_snr``, the mean of
        ln(signal power / noise power) over them, and ``loss``. The mean over bands is the mean of ``losses``.

    Raises:
        ValueError: If the draws do not divide by the bands.
    """
    draws = losses.shape[1]
    check_bands(draws, bands)
    num_timesteps = scheduler.config.num_train_timesteps
    rows: list[dict[str, float]] = []
    for band, part in enumerate(losses.chunk(bands, dim=1)):
        begin, end = band * part.shape[1], (band + 1) * part.shape[1]
        first, last = begin * num_timesteps // draws, (end * num_timesteps - 1) // draws
        level = log_snr(scheduler, torch.arange(first, last + 1, device="cpu")).double().mean()
        rows.append(
            {"first_timestep": first, "last_timestep": last, "log_snr": float(level), "loss": float(part.mean())}
        )
    return rows


def check_bands(draws: int, bands: int) -> None:
    """Refuse draws that do not divide evenly among bands.

    Raises:
        ValueError: With both numbers.
    """
    if bands < 1 or draws < 1 or draws % bands:
        raise ValueError(
            f"--draws_per_image {draws} does not divide by --timestep_bands {bands}: each band gets as many draws as "
            "any other"
        )
