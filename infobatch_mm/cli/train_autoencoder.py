"""Train a small first stage of latent diffusion, a VQModel or an AutoencoderKL of diffusers, on a folder of images.

infobatch-mm train-autoencoder --train_data_dir data/faces --resolution 64 --output_dir work_dirs/vq
accelerate launch -m infobatch_mm.cli.train_autoencoder --train_data_dir ...

It learns pixels only (L1 + MSE, no adversarial and no perceptual loss), so its reconstructions are somewhat smooth: a
first stage to try things with. Where a published one suits your images, take that.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffusers.optimization import SchedulerType

from ..diffusion.first_stage_training import train
from ..diffusion.image_options import add_data_arguments

#: Options that count something.
_POSITIVE = (
    *("resolution", "downsample_factor", "latent_channels", "block_out_channels", "layers_per_block"),
    *("num_vq_embeddings", "train_batch_size", "num_epochs", "max_train_steps"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says.

    Args:
        argv (Sequence[str], optional): The arguments. Defaults to the command line of this process.
    """
    args = parse_args(argv)
    try:
        train(args)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options; flags that diffusers' training examples have too mean the same here.

    Args:
        argv (Sequence[str], optional): The arguments. Defaults to the command line of this process.

    Returns:
        argparse.Namespace: The options, with widths and channels of the model filled in.

    Raises:
        SystemExit: With a message, for an option that is unknown, missing or out of its range.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.logger == "none":
        args.logger = None

    if (args.train_data_dir is None) == (args.dataset_name is None):
        parser.error("name one of --train_data_dir and --dataset_name")
    for name in _POSITIVE:
        given = getattr(args, name)
        if given is not None and min(given if isinstance(given, list) else [given]) < 1:
            parser.error(f"--{name} is {given}, and must be at least 1")
    _settle_widths(parser, args)
    if args.latent_channels is None:
        args.latent_channels = 3 if args.model_type == "vq" else 4
    return args


def _parser() -> argparse.ArgumentParser:
    summary, _, about = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_data_arguments(parser, resolution=64)
    model = parser.add_argument_group("model")
    model.add_argument("--model_type", choices=("vq", "kl"), default="vq", help="VQModel or AutoencoderKL")
    model.add_argument("--downsample_factor", type=int, default=4, help="image width over latent width, 2^n")
    model.add_argument("--latent_channels", type=int, help="channels of the latents (default: 3 for vq, 4 for kl)")
    model.add_argument(
        "--block_out_channels", type=int, nargs="+", help="n + 1 widths, the first at full resolution (default: by n)"
    )
    model.add_argument("--layers_per_block", type=int, default=1, help="residual blocks at each resolution")
    model.add_argument("--num_vq_embeddings", type=int, default=512, help="size of the codebook (vq)")
    model.add_argument("--kl_weight", type=float, default=1e-4, help="weight of the KL term, per latent value (kl)")
    training = parser.add_argument_group("training")
    training.add_argument("--train_batch_size", type=int, default=16, help="images in a batch, of each process")
    training.add_argument("--num_epochs", type=int, default=8, help="passes over the images")
    training.add_argument("--max_train_steps", type=int, help="steps, instead of --num_epochs")
    training.add_argument("--learning_rate", type=float, default=2e-3, help="of Adam, after the warm-up")
    training.add_argument(
        "--lr_scheduler", choices=[kind.value for kind in SchedulerType], default="cosine", help="shape of the schedule"
    )
    training.add_argument("--lr_warmup_steps", type=int, default=50, help="steps of the warm-up")
    training.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"), help="default: as accelerate is configured"
    )
    training.add_argument("--seed", type=int, default=0, help="seed of weights, order, augmentation")
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", type=Path, default=Path("autoencoder"), help="where the model is saved")
    output.add_argument("--save_images_epochs", type=int, default=5, help="epochs between pictures; 0: at the end only")
    output.add_argument("--logger", default="none", help="tensorboard, wandb or none")
    output.add_argument("--cpu", action="store_true", help="train on the CPU")
    return parser


def _settle_widths(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check the factor by which images shrink, and choose the widths of the model where they are not given."""
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


if __name__ == "__main__":
    main()
