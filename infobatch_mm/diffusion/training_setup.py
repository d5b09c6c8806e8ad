"""What a latent-diffusion training is made of, built from its options; what cannot be trained is refused here."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import ProjectConfiguration
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from .denoising import Denoising
from .encoding import warn_of_scale
from .first_stage import FirstStage, check_fits, load_first_stage
from .image_checks import check_images, fingerprint_images
from .image_options import open_held_out, open_images
from .images import Images
from .latents import CachedLatents, cache_latents


@dataclass(frozen=True)
class TrainingImages:
    """The images of a training.

    Attributes:
        images (Images): The images themselves, N of them.
        fingerprint (str): As of :func:`.fingerprint_images`.
        dataset (Images | CachedLatents): What batches are made of: the images, or their latents; N items.
        held_out (Images | None): Images whose denoising loss is measured at the end.
    """

    images: Images
    fingerprint: str
    dataset: Images | CachedLatents
    held_out: Images | None


def build_denoising(args: argparse.Namespace) -> Denoising:
    """Build the denoising objective and its noise schedule.

    Raises:
        ValueError: If ``--snr_gamma`` is not positive.
    """
    noise_scheduler = DDPMScheduler(
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        beta_start=args.ddpm_beta_start,
        beta_end=args.ddpm_beta_end,
        prediction_type=args.prediction_type,
        clip_sample=False,  # latents are no pixels: they leave [-1, 1]
    )
    return Denoising(noise_scheduler, args.snr_gamma)


def build_accelerator(args: argparse.Namespace) -> Accelerator:
    """Build the accelerator, and the output folder that it logs to.

    Raises:
        ValueError: If the folder cannot be made, or the logger is not installed.
    """
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to --output_dir {output_dir}: {error}") from error
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.logger == "none" else args.logger,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        # An order that a resumed run repeats, also where nothing is pruned.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    # accelerate leaves out a tracker that is not installed, and says so only in its log.
    if accelerator.log_with == [] and args.logger != "none":
        raise ValueError(f"--logger {args.logger} is not installed: install it, or use --logger none")
    return accelerator


def open_first_stage(args: argparse.Namespace, device: torch.device) -> FirstStage:
    """Load the first stage, and refuse it if UNet and images do not fit it.

    Returns:
        VQModel | AutoencoderKL: Frozen, in evaluation mode, on the device.

    Raises:
        ValueError: If there is none, or the UNet is made for other latents.
    """
    vae = load_first_stage(args.vae).to(device)
    if args.vae_scaling_factor is not None:
        vae.register_to_config(scaling_factor=args.vae_scaling_factor)
    check_fits(vae, args.unet_config, args.resolution)
    # Refuse settings that make no model before hours of encoding; without memory, and without drawing weights.
    with torch.device("meta"):
        UNet2DModel.from_config(args.unet_config)
    return vae


def open_training_images(args: argparse.Namespace, vae: FirstStage, accelerator: Accelerator) -> TrainingImages:
    """Open and check all images, and encode those to train on where ``--cache_latents`` asks for it.

    Every process must call it, and takes its share of the work.

    Raises:
        ValueError: On every process: if images cannot be read or trained on, or are fewer than a global batch.
    """
    images = open_images(args)
    check_images(images)
    global_batch = args.train_batch_size * accelerator.num_processes
    if global_batch > len(images):
        raise ValueError(
            f"one global batch holds {global_batch} images but there are only {len(images)}: use a smaller "
            "--train_batch_size"
        )
    fingerprint = fingerprint_images(images)
    if accelerator.is_main_process:
        warn_of_scale(vae, images)
    held_out = open_held_out(args)
    dataset: Images | CachedLatents = images
    if args.cache_latents:
        cache_dir = Path(args.latents_dir or Path(args.output_dir, "latents"))
        dataset = cache_latents(
            images, fingerprint, vae, cache_dir, accelerator, args.train_batch_size, args.dataloader_num_workers
        )
    return TrainingImages(images, fingerprint, dataset, held_out)


def build_loader(args: argparse.Namespace, dataset: Images | CachedLatents) -> DataLoader:
    """Build the loader of one process's batches, before it is prepared."""
    return DataLoader(
        dataset,
        args.train_batch_size,
        shuffle=True,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
    )


def build_optimizer(args: argparse.Namespace, unet: nn.Module) -> torch.optim.AdamW:
    """Build AdamW over all weights of the UNet."""
    return torch.optim.AdamW(
        unet.parameters(),
        args.learning_rate,
        (args.adam_beta1, args.adam_beta2),
        args.adam_epsilon,
        args.adam_weight_decay,
    )


def build_lr_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, num_samples: int, num_processes: int
) -> LambdaLR:
    """Build the learning-rate schedule over the updates of the unpruned training.

    Args:
        args (argparse.Namespace): Options of :func:`.parse_options`.
        optimizer (Optimizer): The optimiser.
        num_samples (int): Images in the data set.
        num_processes (int): Processes that share it; accelerate steps the schedule so many times at each update.

    Returns:
        LambdaLR: As long as the training, in these steps.
    """
    batches = math.ceil(num_samples / (args.train_batch_size * num_processes))
    updates = args.max_train_steps or args.num_epochs * math.ceil(batches / args.gradient_accumulation_steps)
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * num_processes,
        num_training_steps=updates * num_processes,
    )


def loggable(args: argparse.Namespace) -> dict[str, Any]:
    """Pick the options that trackers can store: numbers, strings and truth values."""
    return {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str, bool))}
