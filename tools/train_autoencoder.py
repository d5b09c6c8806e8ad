"""Train a small first stage of latent diffusion, a VQModel or an AutoencoderKL of diffusers, on a folder of images.

accelerate launch tools/train_autoencoder.py --train_data_dir data/faces --resolution 64 --output_dir work_dirs/vq

It learns pixels only (L1 + MSE, no adversarial and no perceptual loss), so its reconstructions are somewhat smooth: a
first stage to try things with. Where a published one suits your images, take that.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _images import add_data_arguments, open_images
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, VQModel
from diffusers.optimization import SchedulerType, get_scheduler
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from infobatch_mm.diffusion.images import Images, check_images

#: Images that the error and the latents' spread are measured on at the end, at most.
MEASURED = 1024
#: Images shown in a picture of reconstructions.
SHOWN = 16
#: Options that count something.
_POSITIVE = (
    *("resolution", "downsample_factor", "latent_channels", "block_out_channels", "layers_per_block"),
    *("num_vq_embeddings", "train_batch_size", "num_epochs", "max_train_steps"),
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; flags that diffusers' training examples have too mean the same here."""
    summary, _, about = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_data_arguments(parser, resolution=64)
    model = parser.add_argument_group("model")
    model.add_argument("--model_type", choices=("vq", "kl"), default="vq", help="VQModel or AutoencoderKL")
    model.add_argument("--downsample_factor", type=int, default=4, help="resolution over that of the latents, 2^n")
    model.add_argument("--latent_channels", type=int, help="channels of the latents (default: 3 for vq, 4 for kl)")
    model.add_argument(
        "--block_out_channels", type=int, nargs="+", help="n + 1 widths, the first at full resolution (default: by n)"
    )
    model.add_argument("--layers_per_block", type=int, default=1, help="residual blocks at each resolution")
    model.add_argument("--num_vq_embeddings", type=int, default=512, help="size of the codebook (vq)")
    model.add_argument("--kl_weight", type=float, default=1e-4, help="weight of the KL term, per latent value (kl)")
    train = parser.add_argument_group("training")
    train.add_argument("--train_batch_size", type=int, default=16, help="images in a batch, of each process")
    train.add_argument("--num_epochs", type=int, default=8, help="passes over the images")
    train.add_argument("--max_train_steps", type=int, help="steps, instead of --num_epochs")
    train.add_argument("--learning_rate", type=float, default=2e-3, help="of Adam, after the warm-up")
    train.add_argument(
        "--lr_scheduler", choices=[kind.value for kind in SchedulerType], default="cosine", help="shape of the schedule"
    )
    train.add_argument("--lr_warmup_steps", type=int, default=50, help="steps of the warm-up")
    train.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: as accelerate is configured")
    train.add_argument("--seed", type=int, default=0, help="seed of weights, order, augmentation")
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", type=Path, default=Path("autoencoder"), help="where the model is saved")
    output.add_argument("--save_images_epochs", type=int, default=5, help="epochs between pictures; 0: at the end only")
    output.add_argument("--logger", default="none", help="tensorboard, wandb or none")
    output.add_argument("--cpu", action="store_true", help="train on the CPU")
    args = parser.parse_args(argv)
    if args.logger == "none":
        args.logger = None

    if (args.train_data_dir is None) == (args.dataset_name is None):
        parser.error("name one of --train_data_dir and --dataset_name")
    for name in _POSITIVE:
        given = getattr(args, name)
        if given is not None and min(given if isinstance(given, list) else [given]) < 1:
            parser.error(f"--{name} is {given}, and must be at least 1")
    halvings = args.downsample_factor.bit_length() - 1
    if 2**halvings != args.downsample_factor or args.resolution % args.downsample_factor:
        parser.error(
            f"--downsample_factor {args.downsample_factor}: it must be a power of two that divides --resolution "
            f"{args.resolution}"
        )
    if args.block_out_channels is None:
        # Narrow where the maps are large: that is where the time goes.
        args.block_out_channels = [16, 32, 64, 64, 128, 128, 256][: halvings + 1]
    if len(args.block_out_channels) != halvings + 1:
        parser.error(
            f"--block_out_channels has {len(args.block_out_channels)} widths; --downsample_factor "
            f"{args.downsample_factor} needs {halvings + 1}"
        )
    if args.latent_channels is None:
        args.latent_channels = 3 if args.model_type == "vq" else 4
    return args


def build_model(args: argparse.Namespace) -> VQModel | AutoencoderKL:
    """The model that the command line describes, untrained."""
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
    """A training step's forward pass in one module, as DistributedDataParallel wants it."""

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


class Codebook:
    """Keeps a VQModel's codes in use: a code that no latent is near to gets no gradient, and would never be.

    For the first tenth of the training the model is a plain autoencoder. Then the codes are drawn from its latents,
    and until the middle of the training those that were not used lately are drawn anew.

    Args:
        vae (VQModel): The model.
        accelerator (Accelerator): Of the run; all processes draw the same codes.
        steps (int): Length of the training.
        seed (int): Seed of the draws.
    """

    #: Latest batches whose latents are kept to draw from.
    BATCHES = 8

    def __init__(self, vae: VQModel, accelerator: Accelerator, steps: int, seed: int) -> None:
        self._vae = vae
        self._accelerator = accelerator
        self._start = max(1, steps // 10)
        self._end = max(self._start, steps // 2)
        self._interval = max(1, steps // 50)
        self._generator = torch.Generator().manual_seed(seed)
        self._latents: list[Tensor] = []

    def used_at(self, step: int) -> bool:
        """Whether the model quantises in a step, counted from 0."""
        return step >= self._start

    def after_step(self, step: int, latents: Tensor) -> None:
        """Draw codes where it is time; every process calls it after each step.

        Args:
            step (int): The step that was done, from 0.
            latents (Tensor): This process's latents before quantisation, shape ``(B, C, h, w)``.
        """
        if step >= self._end:
            return
        self._latents = [*self._latents[1 - self.BATCHES :], latents.movedim(1, -1).flatten(0, -2).float()]
        codes = self._vae.quantize.embedding.weight
        if step + 1 == self._start:
            codes.data.copy_(self._draw(len(codes)))
        elif self.used_at(step) and (step + 1 - self._start) % self._interval == 0:
            counts = torch.bincount(torch.cdist(torch.cat(self._latents), codes.data).argmin(1), minlength=len(codes))
            unused = self._accelerator.reduce(counts) == 0
            codes.data[unused] = self._draw(int(unused.sum()))

    def _draw(self, count: int) -> Tensor:
        """Latents of all processes, shape ``(count, C)``, drawn with a little noise, so that no two are the same."""
        # an equal number from each process, so that they can be gathered
        everyones = self._accelerator.gather(torch.cat(self._latents))
        chosen = torch.randint(len(everyones), (count,), generator=self._generator)
        noise = torch.randn(count, everyones.shape[1], generator=self._generator).to(everyones)
        return everyones[chosen.to(everyones.device)] + 0.01 * everyones.std(0) * noise


def train(args: argparse.Namespace) -> None:
    """Train, measure and save."""
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
            show(args.output_dir / f"reconstructions_{epoch + 1:04d}.png", vae, images, accelerator)
    progress.close()

    took = time.monotonic() - begun
    if accelerator.is_main_process:
        finish(args, vae, images, accelerator, took)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _epochs(loader: DataLoader) -> Iterator[tuple[int, dict[str, Tensor]]]:
    epoch = 0
    while True:
        for batch in loader:
            yield epoch, batch
        epoch += 1


@torch.no_grad()
def finish(
    args: argparse.Namespace, vae: VQModel | AutoencoderKL, images: Images, accelerator: Accelerator, took: float
) -> None:
    """Measure the latents' spread and the error, save model and pictures, and say what came of it."""
    vae.eval()
    errors, values, codes = [], [], []
    shown = _spread(len(images), MEASURED)
    for first in range(0, len(shown), 64):
        pixels = torch.stack([images.fixed(i) for i in shown[first : first + 64]]).to(accelerator.device)
        if isinstance(vae, AutoencoderKL):
            latents = vae.encode(pixels).latent_dist.sample()
        else:
            latents = vae.encode(pixels).latents
            codes.append(vae.quantize(latents)[2][2].flatten())
        made = vae.decode(latents).sample.clamp(-1, 1)
        errors.append((made - pixels).square().flatten(1).mean(1))
        values.append(latents)
    # of an image in [-1, 1], whose range is 2
    psnr = (10 * torch.log10(4 / torch.cat(errors).clamp_min(1e-10))).mean().item()
    spread = torch.cat(values).std().item()
    vae.register_to_config(scaling_factor=1 / spread)
    vae.save_pretrained(args.output_dir)
    show(args.output_dir / "reconstructions.png", vae, images, accelerator)
    accelerator.log({"psnr": psnr})
    used = ""
    if codes:
        used = f", {len(torch.cat(codes).unique())} of {args.num_vq_embeddings} codes in use"
    channels, height, width = values[0].shape[1:]
    print(
        f"saved to {args.output_dir}: latents {channels}x{height}x{width}, scaling_factor {1 / spread:.4f}{used}; "
        f"trained for {took:.0f} s; PSNR {psnr:.2f} dB on {len(shown)} of the training images"
    )


def show(path: Path, vae: VQModel | AutoencoderKL, images: Images, accelerator: Accelerator) -> None:
    """Write a picture of images, rows of originals above rows of their reconstructions, from the main process."""
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
    rows = [part for pair in zip(pixels.split(8), made.split(8), strict=True) for part in pair]
    grid = make_grid(torch.cat(rows), nrow=min(8, len(pixels)), value_range=(-1, 1), normalize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(grid.mul(255).round().byte().permute(1, 2, 0).cpu().numpy())
    if images.resolution < 96:  # small images are enlarged to be seen
        picture = picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)
    picture.save(path)


def _spread(total: int, wanted: int) -> list[int]:
    """Indices that are spread evenly over a data set."""
    count = min(total, wanted)
    return [i * total // count for i in range(count)]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse_args(argv)
    try:
        train(args)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
