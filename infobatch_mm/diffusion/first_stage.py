"""The frozen first stage of latent diffusion: a VQModel or an AutoencoderKL of diffusers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, UNet2DModel, VQModel
from huggingface_hub.errors import LocalEntryNotFoundError
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
    kind, subfolder = _find(name)
    try:
        vae, info = _CLASSES[kind].from_pretrained(name, subfolder=subfolder, output_loading_info=True)
    except Exception as error:  # of damaged files diffusers raises almost anything
        raise _refusal(name, str(error).strip().partition("\n")[0]) from error
    if missing := info["missing_keys"]:
        raise _refusal(name, f"{len(missing)} of its weights are not in the file, such as {missing[0]}")
    if vae.config.get("shift_factor"):
        raise ValueError(
            f"the first stage {name} shifts its latents by {vae.config.shift_factor}, which LDMPipeline does not "
            "undo: use one without shift_factor"
        )
    return vae.requires_grad_(False).eval()


def _find(name: str) -> tuple[str, str | None]:
    """Class of a first stage, and the folder below ``name`` that it is in: here first, only then on the hub."""
    other = absent = None
    for here in (True,) if Path(name).exists() else (True, False):
        for subfolder in _SUBFOLDERS:
            try:
                config = VQModel.load_config(name, subfolder=subfolder, local_files_only=here)
            except (OSError, ValueError) as error:
                absent = absent or str(error).partition("\n")[0]
                if not here and isinstance(error.__context__, LocalEntryNotFoundError):
                    break  # the hub is out of reach: asking on takes half a minute each time
                continue
            kind = config.get("_class_name") if isinstance(config, dict) else None
            if kind in _CLASSES:
                return kind, subfolder
            model = f"a {kind}" if kind else "no model of diffusers"
            other = other or f"it holds {model}" + (f" in {subfolder}/" if subfolder else "")
    raise _refusal(name, other or str(absent))


def _refusal(name: str, reason: str) -> ValueError:
    return ValueError(
        f"cannot load a first stage from {name!r} ({reason}): name the folder of a VQModel, an AutoencoderKL or a "
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
    defaults = {name: default.default for name, default in inspect.signature(UNet2DModel.__init__).parameters.items()}
    if unknown := [name for name in unet_config if name not in defaults and not name.startswith("_")]:
        raise ValueError(f"a UNet2DModel has no setting {unknown[0]!r}: it has {', '.join(list(defaults)[1:])}")
    unet_config = {**defaults, **unet_config}
    for name in ("in_channels", "out_channels"):
        if (given := unet_config[name]) != channels:
            raise ValueError(
                f"the UNet has {name}={given}, the latents of the first stage have {channels} channels: set {name} to "
                f"{channels}"
            )
    given = unet_config["sample_size"]
    if given not in (size, [size, size], (size, size)):
        raise ValueError(
            f"the UNet has sample_size={given}, images of {resolution} pixels have latents of {size}x{size}: set "
            f"sample_size to {size}, or another resolution"
        )
    levels = len(unet_config["block_out_channels"])
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
    """Identify a first stage by its settings and weights.

    Returns:
        str: 32 hexadecimal digits.
    """
    settings = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    whole = blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, weight in sorted(vae.state_dict().items()):
        whole.update(name.encode())
        whole.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()
