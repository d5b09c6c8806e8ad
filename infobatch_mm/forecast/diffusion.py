"""Trainings of latent diffusion: a recipe's model and images, one image at a time."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core import PruningPolicy, build_policy, rng
from ..core.last_layer import LastLayer
from ..diffusion.denoising import draw, in_part, predictor
from ..diffusion.encoding import to_latents
from ..diffusion.first_stage import latent_shape
from ..diffusion.image_checks import check_images
from ..diffusion.image_options import open_images
from ..diffusion.training_setup import build_denoising, open_first_stage
from .gradients import Look

#: Where the weights of a UNet lie in what ``train-ldm`` leaves behind: the pipeline's are averaged, if any are.
_PLACES = ("unet/diffusion_pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.safetensors")


class RecipeSubject:
    """The UNet of a recipe at a checkpoint, and its images. Nothing is written; images are encoded as they are visited.

    Args:
        args (argparse.Namespace): Options of :func:`.parse_options`.
        checkpoint (str): Folder of a checkpoint of ``train-ldm``, or of its pipeline.
        num_processes (int): Processes that share a step. Defaults to 1.
        bands (int): Where positive, a unit is an image and one of so many equal parts of the noise schedule, in place
            of an image: what draws of noise levels would be worth. Unit i is of image ``i // bands``. Defaults to 0.

    Attributes:
        model (nn.Module): The UNet, in training mode.
        num_samples (int): Number of images, or of units.
        batch_size (int): Images in an optimiser step.
        remarks (list[str]): What is to be said of how it is looked at.

    Raises:
        ValueError: If there is no checkpoint, it is of another UNet, or images and first stage do not fit.
    """

    def __init__(self, args: argparse.Namespace, checkpoint: str, num_processes: int = 1, bands: int = 0) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
        weights = _weights_of(checkpoint)
        self._denoising = build_denoising(args)
        self._vae = open_first_stage(args, device)
        self._images = open_images(args)
        check_images(self._images)
        self.model: nn.Module = UNet2DModel.from_config(args.unet_config)
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise ValueError(f"--checkpoint {checkpoint} is of another UNet: {reason}") from None
        self.model.to(device).train()
        self._layer = LastLayer(self.model.conv_out)
        self._shape = latent_shape(self._vae, args.resolution)
        self._num_timesteps = args.ddpm_num_steps
        self._device = device
        self._bands = bands
        self.num_samples = len(self._images) * max(1, bands)
        self.batch_size = args.train_batch_size * args.gradient_accumulation_steps * num_processes
        within = f"of its one of {bands} parts of the schedule" if bands else "of the whole schedule"
        self.remarks = [f"a visit is at one random timestep {within}: what differs within that is chance here"]

    def look(self, index: int, key: tuple[int, ...]) -> Look:
        """Visit one image at one timestep; see :class:`.Subject`."""
        image, band = divmod(index, self._bands or 1)
        with rng.seeded(key):
            item = self._images[image]
            # Seed, image and view are the key's; a pass and a repeat are nothing of it.
            drawn = draw([index], self._shape, self._num_timesteps, key[0], key[-1])
            timesteps = in_part(drawn.timesteps, band, self._bands or 1, self._num_timesteps).to(self._device)
            batch = {name: each[None].to(self._device) for name, each in item.items()}
            latents = to_latents(self._vae, batch, drawn)
            noise = drawn.noise.to(self._device)
            losses, scores = self._denoising.losses(predictor(self.model), latents, noise, timesteps)
            objective = losses.sum()
            norms = self._layer.take(losses).expect(losses, torch.ones_like(losses), objective)
            objective.backward()
        return Look(float(scores[0]), float(norms[0]))


def own_policy(args: argparse.Namespace) -> PruningPolicy:
    """The policy that the options name."""
    return build_policy(args.policy, args.prune_ratio, args.delta, args.prune_quantile)


def _weights_of(checkpoint: str) -> dict[str, Tensor]:
    for place in _PLACES:
        if (path := Path(checkpoint, place)).is_file():
            return load_file(path)
    raise ValueError(
        f"--checkpoint {checkpoint}: there are no weights of a UNet; give a folder checkpoint-N of train-ldm, or its "
        "--output_dir when it is done"
    )
