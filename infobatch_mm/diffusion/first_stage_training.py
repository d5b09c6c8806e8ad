"""The training of a small first stage, a VQModel or an AutoencoderKL of diffusers, by pixels alone."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, VQModel
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .codebook import Codebook
from .image_checks import check_images
from .image_options import open_images
from .images import Images
from .reconstructions import measure, save_reconstructions


def build_model(args: argparse.Namespace) -> VQModel | AutoencoderKL:
    """Build the model that the options describe, untrained."""
    widths = tuple(args.block_out_channels)
    settings: dict[str, Any] = dict(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=args.latent_channels,
        layers_per_block=args.layers_per_block,
        norm_num_groups=math.gcd(8, *widths),
        sample_size=args.resolution,
        scaling_factor=1.0,  # measured in the end
    )
    if args.model_type == "kl":
        return AutoencoderKL(**settings)
    return VQModel(**settings, num_vq_embeddings=args.num_vq_embeddings)


class Autoencoding(nn.Module):
    """The whole forward pass of a training step in one module: DistributedDataParallel wraps modules, not functions.

    Args:
        vae (VQModel | AutoencoderKL): The model.
    """

    def __init__(self, vae: VQModel | AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, quantise: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct.

        Args:
            images (Tensor): Shape ``(B, 3, R, R)``, in [-1, 1].
            quantise (bool): Whether a VQModel uses its codebook. Defaults to True.

        Returns:
            tuple[Tensor, Tensor, Tensor]: Reconstructions, as ``images``; the commitment loss, or the KL divergence
            per latent value, a scalar; latents before quantisation, or means, shape ``(B, C, h, w)``, detached.
        """
        if isinstance(self.vae, AutoencoderKL):
            posterior = self.vae.encode(images).latent_dist
            divergence = posterior.kl().mean() / posterior.mean[0].numel()
            return self.vae.decode(posterior.sample()).sample, divergence, posterior.mean.detach()
        latents = self.vae.encode(images).latents
        decoded = self.vae.decode(latents, force_not_quantize=not quantise)
        # Codes that are not used yet get a gradient all the same, of zero: DistributedDataParallel waits for it.
        commitment = decoded.commit_loss.mean() + 0.0 * self.vae.quantize.embedding.weight.sum()
        return decoded.sample, commitment, latents.detach()


def train(args: argparse.Namespace) -> None:
    """Train a first stage, measure it and save it.

    Args:
        args (argparse.Namespace): Options of ``infobatch-mm train-autoencoder``.

    Raises:
        ValueError: If the images cannot be trained on.
    """
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        log_with=args.logger,
        project_dir=str(args.output_dir),
    )
    set_seed(args.seed)
    images = open_images(args)
    check_images(images)
    if args.logger:
        accelerator.init_trackers("train_autoencoder", {k: str(v) for k, v in vars(args).items()})
    vae = build_model(args)
    took = _fit(args, vae, images, accelerator)
    if accelerator.is_main_process:
        _finish(args, vae, images, accelerator, took)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _fit(args: argparse.Namespace, vae: VQModel | AutoencoderKL, images: Images, accelerator: Accelerator) -> float:
    """Make all steps; returns the seconds that they took."""
    optimizer: torch.optim.Optimizer = torch.optim.Adam(vae.parameters(), lr=args.learning_rate)
    loader = DataLoader(images, args.train_batch_size, shuffle=True, num_workers=args.dataloader_num_workers)
    model, optimizer, loader = accelerator.prepare(Autoencoding(vae), optimizer, loader)
    steps = args.max_train_steps or args.num_epochs * len(loader)
    # Not prepared: accelerate would step it once for each process.
    schedule = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=steps
    )
    codebook = Codebook(vae, accelerator, steps, args.seed) if isinstance(vae, VQModel) else None

    begun = time.monotonic()
    progress = tqdm(total=steps, desc="autoencoder", disable=not accelerator.is_local_main_process, mininterval=2)
    for step, (epoch, batch) in zip(range(steps), _epochs(loader), strict=False):
        pixels = batch["pixel_values"]
        made, regulariser, latents = model(pixels, codebook is None or codebook.used_at(step))
        difference = made - pixels
        reconstruction = difference.abs().mean() + difference.square().mean()
        loss = reconstruction + (1.0 if codebook else args.kl_weight) * regulariser
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if codebook is not None:
            codebook.after_step(step, latents)
        progress.update()
        if step % 10 == 0:
            values = {"reconstruction": reconstruction.item(), "regulariser": regulariser.item()}
            progress.set_postfix({name: f"{value:.4f}" for name, value in values.items()})
            accelerator.log({**values, "lr": schedule.get_last_lr()[0]}, step=step)
        ends = (step + 1) % len(loader) == 0
        if ends and args.save_images_epochs and (epoch + 1) % args.save_images_epochs == 0:
            save_reconstructions(args.output_dir / f"reconstructions_{epoch + 1:04d}.png", vae, images, accelerator)
    progress.close()
    return time.monotonic() - begun


def _epochs(loader: DataLoader) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Batches of pass after pass, with the number of their pass."""
    epoch = 0
    while True:
        for batch in loader:
            yield epoch, batch
        epoch += 1


def _finish(
    args: argparse.Namespace, vae: VQModel | AutoencoderKL, images: Images, accelerator: Accelerator, took: float
) -> None:
    """Measure the latents' spread and the error, save model and picture, and say what came of it."""
    vae.eval()
    found = measure(vae, images, accelerator.device)
    vae.register_to_config(scaling_factor=1 / found.spread)
    vae.save_pretrained(args.output_dir)
    save_reconstructions(args.output_dir / "reconstructions.png", vae, images, accelerator)
    accelerator.log({"psnr": found.psnr})
    used = "" if found.codes is None else f", {found.codes} of {args.num_vq_embeddings} codes in use"
    channels, height, width = found.shape
    print(
        f"saved to {args.output_dir}: latents {channels}x{height}x{width}, "
        f"scaling_factor {1 / found.spread:.4f}{used}; trained for {took:.0f} s; "
        f"PSNR {found.psnr:.2f} dB on {found.measured} of the training images"
    )
