"""The frozen first stage of latent diffusion: a VQModel or an AutoencoderKL of diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

FirstStage: TypeAlias = VQModel | AutoencoderKL

_CLASSES: dict[str, type[FirstStage]] = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}
#: Where a first stage may be, below what is named: there, or as part of a pipeline.
_SUBFOLDERS = (None, "vqvae", "vae")


def load_first_stage(name: str) -> FirstStage:
    """Load a first stage, frozen and in evaluation mode.

    Args:
        name (str): Folder of a saved model or pipeline, or an id of the hub.

    Returns:
        VQModel | AutoencoderKL: On the CPU, float32.

    Raises:
        ValueError: If there is none, or it is one whose latents are shifted, which ``LDMPipeline`` does not undo.
    """
    reasons = []
    for subfolder in _SUBFOLDERS:
        where = {} if subfolder is None else {"subfolder": subfolder}
        try:
            kind = VQModel.load_config(name, **where).get("_class_name")
            if kind not in _CLASSES:
                reasons.append(f"it holds a {kind}")
                continue
            vae = _CLASSES[kind].from_pretrained(name, **where)
        except (OSError, ValueError) as error:
            reasons.append(str(error).splitlines()[0])
            continue
        if vae.config.get("shift_factor"):
            raise ValueError(
                f"the first stage {name} shifts its latents by {vae.config.shift_factor}, which LDMPipeline does not "
                "undo: use one without shift_factor"
            )
        return vae.requires_grad_(False).eval()
    raise ValueError(
        f"cannot load a first stage from {name!r} ({reasons[0]}): name the folder of a VQModel, an AutoencoderKL or a "
        "pipeline with one, such as tools/train_autoencoder.py leaves behind, or an id of the hub, which must be "
        "reachable or in the cache already"
    )


def latent_shape(vae: FirstStage, resolution: int) -> tuple[int, int, int]:
    """Shape of the latents of square images.

    Args:
        vae (VQModel | AutoencoderKL): The first stage.
        resolution (int): Width and height of the images in pixels.

    Returns:
        tuple[int, int, int]: ``(C, h, w)``.

    Raises:
        ValueError: If the resolution does not divide.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if resolution % factor:
        raise ValueError(
            f"resolution={resolution} does not divide by {factor}, by which the first stage shrinks images"
        )
    is_vq = isinstance(vae, VQModel)
    channels = vae.config.vq_embed_dim if is_vq and vae.config.vq_embed_dim is not None else vae.config.latent_channels
    return channels, resolution // factor, resolution // factor


def check_fits(vae: FirstStage, unet_config: Mapping[str, Any], resolution: int) -> None:
    """Refuse a UNet that is made for other latents than the first stage gives.

    Args:
        vae (VQModel | AutoencoderKL): The first stage.
        unet_config (Mapping): Settings of a ``UNet2DModel``.
        resolution (int): Width and height of the images in pixels.

    Raises:
        ValueError: With both values.
    """
    channels, size, _ = latent_shape(vae, resolution)
    for name in ("in_channels", "out_channels"):
        if (given := unet_config.get(name, 3)) != channels:
            raise ValueError(
                f"the UNet has {name}={given}, the latents of the first stage have {channels} channels: set {name} to "
                f"{channels}"
            )
    given = unet_config.get("sample_size")
    if given not in (size, [size, size], (size, size)):
        raise ValueError(
            f"the UNet has sample_size={given}, images of {resolution} pixels have latents of {size}x{size}: set "
            f"sample_size to {size}, or another resolution"
        )
    levels = len(unet_config.get("block_out_channels", (0,)))
    if size % (factor := 2 ** (levels - 1)):
        raise ValueError(
            f"the UNet's {levels} block_out_channels shrink its input {factor} times, latents of {size}x{size} do not "
            "divide by that: use fewer of them, or another resolution"
        )


@torch.no_grad()
def moments(vae: FirstStage, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and standard deviation of the latents of images, scaled by the first stage's ``scaling_factor``.

    Of a ``VQModel`` they are what comes before the quantisation, on which latent diffusion trains (Rombach et al.,
    CVPR 2022, section 3.1: the quantisation belongs to the decoder), and have no spread.

    Args:
        vae (VQModel | AutoencoderKL): The first stage.
        images (Tensor): Shape ``(B, 3, R, R)``, float in [-1, 1], on its device.

    Returns:
        tuple[Tensor, Tensor | None]: Shape ``(B, C, h, w)`` each; None where the latents are certain.
    """
    encoded = vae.encode(images)
    scale = vae.config.scaling_factor
    if isinstance(vae, VQModel):
        return encoded.latents * scale, None
    return encoded.latent_dist.mean * scale, encoded.latent_dist.std * scale


def fingerprint(vae: FirstStage) -> str:
    """What tells one first stage from another: its settings and weights.

    Returns:
        str: 32 hexadecimal digits.
    """
    settings = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    whole = blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, weight in sorted(vae.state_dict().items()):
        whole.update(name.encode())
        whole.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return whole.hexdigest()
