"""What a first stage makes of images: its error on them, and a picture to see it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from .images import Images

#: Images that the error and the latents' spread are measured on, at most.
MEASURED = 1024
#: Images shown in a picture of reconstructions.
SHOWN = 16


class Quality(NamedTuple):
    """What a first stage is worth on some images.

    Attributes:
        psnr (float): Mean over images of the peak signal-to-noise ratio of their reconstructions, in dB.
        spread (float): Standard deviation of the latents before they are scaled.
        shape (tuple[int, int, int]): Shape of a latent, ``(C, h, w)``.
        codes (int | None): How many codes are in use; None where there is no codebook.
        measured (int): Images that were looked at.
    """

    psnr: float
    spread: float
    shape: tuple[int, int, int]
    codes: int | None
    measured: int


@torch.no_grad()
def measure(vae: VQModel | AutoencoderKL, images: Images, device: torch.device) -> Quality:
    """Encode and decode images that are spread over the data set, at most :data:`MEASURED` of them.

    Args:
        vae (VQModel | AutoencoderKL): In evaluation mode, on the device.
        images (Images): The images.
        device (torch.device): The device.

    Returns:
        Quality: Of a posterior a sample is decoded, as in the training.
    """
    errors, values, codes = [], [], []
    shown = _spread(len(images), MEASURED)
    for first in range(0, len(shown), 64):
        pixels = torch.stack([images.fixed(i) for i in shown[first : first + 64]]).to(device)
        if isinstance(vae, AutoencoderKL):
            latents = vae.encode(pixels).latent_dist.sample()
        else:
            latents = vae.encode(pixels).latents
            codes.append(vae.quantize(latents)[2][2].flatten())
        made = vae.decode(latents).sample.clamp(-1, 1)
        errors.append((made - pixels).square().flatten(1).mean(1))
        values.append(latents)
    # The peak squared is 4: values lie in [-1, 1], whose width is 2.
    psnr = (10 * torch.log10(4 / torch.cat(errors).clamp_min(1e-10))).mean().item()
    in_use = len(torch.cat(codes).unique()) if codes else None
    channels, height, width = values[0].shape[1:]
    return Quality(psnr, torch.cat(values).std().item(), (channels, height, width), in_use, len(shown))


def save_reconstructions(path: Path, vae: VQModel | AutoencoderKL, images: Images, accelerator: Accelerator) -> None:
    """Save a picture of images, rows of originals above rows of their reconstructions, on the main process.

    Args:
        path (Path): The picture; its folder is made.
        vae (VQModel | AutoencoderKL): On the accelerator's device; left in the mode that it was in.
        images (Images): The images; :data:`SHOWN` of them are taken, spread over the data set.
        accelerator (Accelerator): The run's.
    """
    if not accelerator.is_main_process:
        return
    training = vae.training
    vae.eval()
    pixels = torch.stack([images.fixed(i) for i in _spread(len(images), SHOWN)]).to(accelerator.device)
    with torch.no_grad():
        latents = vae.encode(pixels)
        z = latents.latent_dist.mode() if isinstance(vae, AutoencoderKL) else latents.latents
        made = vae.decode(z).sample.clamp(-1, 1)
    vae.train(training)
    picture = _side_by_side(pixels, made)
    path.parent.mkdir(parents=True, exist_ok=True)
    if images.resolution < 96:  # small images are enlarged to be seen
        picture = picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)
    picture.save(path)


def _side_by_side(pixels: Tensor, made: Tensor) -> Image.Image:
    """Rows of eight images, each above the row of their reconstructions."""
    rows = [part for pair in zip(pixels.split(8), made.split(8), strict=True) for part in pair]
    grid = make_grid(torch.cat(rows), nrow=min(8, len(pixels)), value_range=(-1, 1), normalize=True)
    return Image.fromarray(grid.mul(255).round().byte().permute(1, 2, 0).cpu().numpy())


def _spread(total: int, wanted: int) -> list[int]:
    """Indices that are spread evenly over a data set."""
    count = min(total, wanted)
    return [i * total // count for i in range(count)]
