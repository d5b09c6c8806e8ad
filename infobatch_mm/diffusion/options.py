"""The options of a latent-diffusion training: flags named as in diffusers' examples, and recipes that set them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from diffusers.optimization import SchedulerType

from ..scores import SCORES
from .denoising import PREDICTION_TYPES
from .image_options import add_data_arguments
from .recipes import as_flags, read_recipe


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options of a training: from the command line, over the recipe that it names.

    Args:
        argv (Sequence[str], optional): The command line. Defaults to None: this process's own.

    Returns:
        argparse.Namespace: The options, checked as far as they can be before anything is loaded.

    Raises:
        SystemExit: With a message, for an option that is unknown, missing or out of its range.
    """
    parser = _parser()
    config = parser.parse_known_args(argv)[0].config
    try:
        recipe = [] if config is None else as_flags(read_recipe(Path(config)))
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"cannot read the recipe {config}: {error}")
    # The recipe becomes the starting point of the second parsing, so that the command line wins.
    _, unknown = parser.parse_known_args(recipe)
    if unknown:
        parser.error(f"the recipe {config} sets what is no option: {' '.join(unknown)}")
    args = parser.parse_args(argv, parser.parse_known_args(recipe)[0])
    _check(parser, args)
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train an unconditional latent-diffusion model with pruning",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", help="recipe: a YAML file of these options; the command line wins over it")
    parser.add_argument("--output_dir", help="where checkpoints, samples and the pipeline go")
    parser.add_argument("--seed", type=int, default=0, help="of model, noise and pruning")
    parser.add_argument("--cpu", action=argparse.BooleanOptionalAction, default=False, help="train on the CPU")

    data = add_data_arguments(parser, resolution=256)
    data.add_argument("--eval_data_dir", help="folder of held-out images: their denoising loss is measured")

    _add_model_options(parser)
    _add_training_options(parser)
    _add_pruning_options(parser)
    _add_output_options(parser)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--vae", help="first stage: a folder of a VQModel or AutoencoderKL, or an id of the hub")
    model.add_argument("--vae_scaling_factor", type=float, help="of the latents, in place of the first stage's own")
    _flag(model, "--cache_latents", False, "encode the images once, before the training")
    model.add_argument("--latents_dir", help="where the encoded images are kept; by default in the output folder")
    model.add_argument("--unet_config", type=_unet_settings, help="UNet2DModel: its config.json, or the folder of one")
    model.add_argument("--prediction_type", choices=PREDICTION_TYPES, default="epsilon", help="what the UNet predicts")
    model.add_argument("--ddpm_num_steps", type=int, default=1000, help="timesteps of the noise schedule")
    betas = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
    model.add_argument("--ddpm_beta_schedule", choices=betas, default="scaled_linear", help="shape of the schedule")
    model.add_argument("--ddpm_beta_start", type=float, default=0.0015, help="beta of its first timestep")
    model.add_argument("--ddpm_beta_end", type=float, default=0.0195, help="beta of its last timestep")


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("training")
    training.add_argument("--train_batch_size", type=int, default=16, help="per process")
    training.add_argument("--num_epochs", type=int, default=100, help="passes over the data")
    steps = "updates of the unpruned training, in place of --num_epochs; the last pass may be partial"
    training.add_argument("--max_train_steps", type=int, help=steps)
    training.add_argument("--gradient_accumulation_steps", type=int, default=1, help="batches per update")
    training.add_argument("--learning_rate", type=float, default=1e-4, help="peak learning rate of AdamW")
    schedules = [each.value for each in SchedulerType if each != SchedulerType.PIECEWISE_CONSTANT]  # which needs rules
    training.add_argument("--lr_scheduler", choices=schedules, default="constant", help="learning-rate schedule")
    training.add_argument("--lr_warmup_steps", type=int, default=0, help="updates of warm-up")
    training.add_argument("--adam_beta1", type=float, default=0.9, help="first beta of AdamW")
    training.add_argument("--adam_beta2", type=float, default=0.999, help="second beta of AdamW")
    training.add_argument("--adam_epsilon", type=float, default=1e-8, help="epsilon of AdamW")
    training.add_argument("--adam_weight_decay", type=float, default=1e-2, help="weight decay of AdamW")
    training.add_argument("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to it; 0 for none")
    training.add_argument("--snr_gamma", type=float, help="gamma of Min-SNR weighting, e.g. 5")
    _flag(training, "--use_ema", False, "average the weights; the pipeline holds the average")
    training.add_argument("--ema_max_decay", type=float, default=0.9999, help="decay of the average")
    training.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="of the UNet")


def _add_pruning_options(parser: argparse.ArgumentParser) -> None:
    pruning = parser.add_argument_group("pruning")
    pruning.add_argument("--prune_ratio", type=float, default=0.5, help="chance that a well-learned image is skipped")
    pruning.add_argument("--delta", type=float, default=0.875, help="share of the training after which none is skipped")
    pruning.add_argument("--policy", default="infobatch", help="infobatch, random, or none for the unpruned training")
    pruning.add_argument("--prune_quantile", type=float, help="share that is well learned; else those below the mean")
    pruning.add_argument("--score", choices=SCORES, default="timestep", help="what images are ranked by")
    pruning.add_argument("--score_ema", type=float, help="decay of the score's average; 0.9 for ema and timestep")


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--checkpointing_steps", type=int, default=500, help="updates between checkpoints")
    output.add_argument("--checkpoints_total_limit", type=int, help="how many checkpoints are kept")
    output.add_argument("--resume_from_checkpoint", help="a checkpoint folder, or latest")
    output.add_argument("--logger", default="tensorboard", help="tensorboard, wandb or none")
    output.add_argument(
        "--save_images_epochs", type=int, default=10, help="epochs between grids of samples; 0 for none"
    )
    output.add_argument("--eval_batch_size", type=int, default=16, help="samples of a grid")
    output.add_argument("--ddpm_num_inference_steps", type=int, default=100, help="steps of DDIM sampling")


def _flag(group: Any, name: str, default: bool, text: str) -> None:
    group.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=text)


def _unet_settings(text: str) -> dict[str, Any]:
    """Read the settings of a UNet2DModel from JSON, from a JSON file, or from the folder of a ``config.json``."""
    try:
        if text.lstrip().startswith("{"):
            return json.loads(text)
        path = Path(text, "config.json") if Path(text).is_dir() else Path(text)
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text} holds a {type(found).__name__}, not the settings of a UNet2DModel")
    return found


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what is missing or makes no sense, before anything is loaded."""
    if (args.train_data_dir is None) == (args.dataset_name is None):
        parser.error("give the images by either --train_data_dir or --dataset_name")
    for name in ("output_dir", "vae", "unet_config"):
        if getattr(args, name) is None:
            parser.error(f"--{name} is needed, here or in a recipe (--config)")
    at_least = dict.fromkeys(
        ("resolution", "train_batch_size", "num_epochs", "gradient_accumulation_steps", "checkpointing_steps"), 1
    )
    at_least |= dict.fromkeys(("ddpm_num_steps", "ddpm_num_inference_steps", "eval_batch_size"), 1)
    at_least |= dict.fromkeys(("seed", "lr_warmup_steps", "dataloader_num_workers", "save_images_epochs"), 0)
    at_least |= dict.fromkeys(("learning_rate", "max_grad_norm"), 0)
    at_least |= {name: 1 for name in ("checkpoints_total_limit", "max_train_steps") if getattr(args, name) is not None}
    if args.ddpm_num_inference_steps >= args.ddpm_num_steps:
        parser.error(
            f"--ddpm_num_inference_steps {args.ddpm_num_inference_steps}: sampling takes fewer steps than the "
            f"{args.ddpm_num_steps} of --ddpm_num_steps"
        )
    if args.vae_scaling_factor is not None and not args.vae_scaling_factor > 0:
        parser.error(f"--vae_scaling_factor {args.vae_scaling_factor}: it must be positive")
    for name, least in at_least.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: it must be at least {least}")
