"""Measure finished latent-diffusion models: distances of their samples to real images, and their held-out loss.

infobatch-mm eval-ldm RUN [RUN ...] --train_data_dir DIR [--eval_data_dir DIR] [--inception FILE]

RUN is an output folder of train-ldm. Each run's numbers go to evaluation.json, its first samples to samples.png. The
images with the lowest scores go to scores.png, and in the rows below them the images with the highest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..diffusion.evaluation import GRID_FILE, SCORES_PICTURE, evaluate
from ..diffusion.image_options import add_data_arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says, and print the runs side by side.

    Args:
        argv (Sequence[str], optional): The arguments. Defaults to the command line of this process.
    """
    args = parse_args(argv)
    try:
        results = evaluate(args)
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    Console().print(table(results))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options.

    Args:
        argv (Sequence[str], optional): The arguments. Defaults to the command line of this process.

    Returns:
        argparse.Namespace: The options, checked as far as they can be before anything is loaded.

    Raises:
        SystemExit: With a message, for an option that is unknown, missing or out of its range.
    """
    parser = argparse.ArgumentParser(
        description="Measure finished latent-diffusion models",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run of train_ldm.py")
    parser.add_argument("--output_dir", help="where the results go, with several runs below it; by default to each run")
    parser.add_argument("--seed", type=int, default=0, help="of the samples' noise")
    parser.add_argument("--cpu", action=argparse.BooleanOptionalAction, default=False, help="evaluate on the CPU")
    parser.add_argument("--batch_size", type=int, default=64, help="images at once")

    # No default: the models say what resolution they have, and another one is refused.
    data = add_data_arguments(parser, resolution=None)
    data.add_argument("--eval_data_dir", help="folder of held-out images: their denoising loss is measured")

    samples = parser.add_argument_group("samples")
    samples.add_argument("--num_samples", type=int, default=1000, help="samples that are compared with the images")
    samples.add_argument("--ddpm_num_inference_steps", type=int, default=50, help="steps of DDIM sampling")
    samples.add_argument("--eta", type=float, default=0.0, help="noise of these steps: 0 for none, 1 for DDPM's")
    samples.add_argument("--grid", type=int, default=16, help=f"shown in {GRID_FILE} and {SCORES_PICTURE}; 0 for none")

    measures = parser.add_argument_group("measures")
    measures.add_argument("--inception", help="file of torch-fidelity's Inception weights, for FID and KID")
    measures.add_argument("--kid_subset_size", type=int, default=1000, help="images of a kernel distance")
    measures.add_argument("--kid_subsets", type=int, default=100, help="kernel distances that are averaged")
    measures.add_argument("--timestep_bands", type=int, default=10, help="equal parts of the schedule")
    measures.add_argument("--draws_per_image", type=int, default=40, help="timesteps at which each image is seen")
    args = parser.parse_args(argv)

    if (args.train_data_dir is None) == (args.dataset_name is None):
        parser.error("give the real images by either --train_data_dir or --dataset_name")
    at_least = dict.fromkeys(("batch_size", "ddpm_num_inference_steps", "kid_subsets", "timestep_bands"), 1)
    at_least |= dict.fromkeys(("seed", "eta", "grid", "dataloader_num_workers"), 0)
    for name, least in {**at_least, "num_samples": 2, "kid_subset_size": 2}.items():
        if not getattr(args, name) >= least:
            parser.error(f"--{name} {getattr(args, name)}: it must be at least {least}")
    return args


def table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Set the runs side by side.

    Args:
        results (Mapping): As :func:`.evaluate` returns them.

    Returns:
        Table: A column for each run, for a console.
    """
    first = next(iter(results.values()))
    several = len({result["first_stage"] for result in results.values()}) > 1
    result = Table(
        title=f"{first['num_samples']} samples, {first['num_images']} real images",
        caption="not comparable between these runs, whose first stages differ: first_stage_*" if several else None,
    )
    result.add_column("", no_wrap=True)
    for name in results:
        result.add_column(name, justify="right")
    for key in ("fid", "kid", "first_stage_fd", "first_stage_kd"):
        if key in first:
            result.add_row(key, *(f"{each[key]:.4g}" for each in results.values()))
        elif f"{key}_mean" in first:
            spread = (f"{each[f'{key}_mean']:.4g} ± {each[f'{key}_std']:.2g}" for each in results.values())
            result.add_row(key, *spread)
    if "held_out_loss" in first:
        result.add_row("held_out_loss", *(f"{each['held_out_loss']:.5f}" for each in results.values()))
        # schedules of different lengths have different timesteps in their bands, but as many bands
        for band in range(len(first["held_out_loss_by_timestep"])):
            rows = [each["held_out_loss_by_timestep"][band] for each in results.values()]
            label = f"  t {rows[0]['first_timestep']} to {rows[0]['last_timestep']}"
            result.add_row(label, *(f"{row['loss']:.5f}" for row in rows))
    return result


if __name__ == "__main__":
    main()
