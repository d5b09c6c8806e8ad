"""Measure finished latent-diffusion models: distances of their samples to real images, and their held-out loss.

python tools/eval_ldm.py RUN [RUN ...] --train_data_dir DIR [--eval_data_dir DIR] [--inception FILE]

RUN is an output folder of train_ldm.py. Each run's numbers go to evaluation.json, its first samples to samples.png, the
images with the lowest scores, and in the rows below them those with the highest, to scores.png.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _images import add_data_arguments, open_held_out, open_images
from diffusers import DDPMScheduler
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from train_ldm import all_encoded, predictor

from infobatch_mm.core import read_scores
from infobatch_mm.diffusion.denoising import Denoising, losses_over_timesteps
from infobatch_mm.diffusion.evaluation import (
    RealPixels,
    check_bands,
    check_counts,
    check_inception,
    distances,
    load_pipeline,
    loss_by_band,
    resolution_of,
    sample,
)
from infobatch_mm.diffusion.first_stage import fingerprint
from infobatch_mm.diffusion.images import Images, check_images, fingerprint_images

#: Written for each run.
RESULT_FILE, GRID_FILE, SCORES_PICTURE = "evaluation.json", "samples.png", "scores.png"
#: Space of features -> what its distances are called.
_NAMES = {
    "first_stage": {
        "frechet": "first_stage_fd",
        "kernel_mean": "first_stage_kd_mean",
        "kernel_std": "first_stage_kd_std",
    },
    "inception": {"frechet": "fid", "kernel_mean": "kid_mean", "kernel_std": "kid_std"},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse_args(argv)
    try:
        results = evaluate(args)
    except ValueError as error:
        sys.exit(f"eval_ldm.py: {error}")
    Console().print(table(results))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options.

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

    # The models say what resolution they have: it is refused if it is another.
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


def evaluate(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure every run, write what was measured, and return it by the runs' names.

    Raises:
        ValueError: Before anything is sampled, if runs, images, weights and options do not fit together.
    """
    check_bands(args.draws_per_image, args.timestep_bands)
    about: dict[str, Any] = {}
    if args.inception is not None:
        about["inception_sha256"] = check_inception(args.inception)
    runs = named(args.runs)
    args.resolution = check_runs(args, runs)
    images = open_images(args)
    check_images(images)
    check_counts(args.num_samples, len(images), args.kid_subset_size)
    held_out = open_held_out(args)
    outputs = output_dirs(args, runs)
    about |= {name: getattr(args, name) for name in ("num_samples", "ddpm_num_inference_steps", "eta", "seed")}
    about |= {"kid_subset_size": args.kid_subset_size, "kid_subsets": args.kid_subsets}
    about |= {"num_images": len(images), "images": fingerprint_images(images), "resolution": args.resolution}

    results = {}
    with tempfile.TemporaryDirectory() as cache_dir:  # features of the real images, for all runs
        for name, run in runs.items():
            print(f"== {name}", flush=True)
            results[name] = {**about, **measure(args, run, images, held_out, outputs[name], cache_dir)}
            (outputs[name] / RESULT_FILE).write_text(json.dumps(results[name], indent=2) + "\n")
    return results


def measure(
    args: argparse.Namespace, run: Path, images: Images, held_out: Images | None, output_dir: Path, cache_dir: str
) -> dict[str, Any]:
    """All measures of one run."""
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    pipeline = load_pipeline(run).to(device)
    samples = sample(
        pipeline, args.num_samples, args.ddpm_num_inference_steps, args.eta, args.seed, batch_size=args.batch_size
    )
    if args.grid:
        save_grid(samples[: args.grid], output_dir / GRID_FILE)
        save_extremes(run, images, args.grid, output_dir / SCORES_PICTURE)
    result: dict[str, Any] = {"first_stage": fingerprint(pipeline.vqvae)}
    spaces = {"first_stage": run} if args.inception is None else {"first_stage": run, "inception": args.inception}
    for space, weights in spaces.items():
        found = distances(
            samples,
            RealPixels(images),
            **{space: weights},
            batch_size=args.batch_size,
            subset_size=args.kid_subset_size,
            subsets=args.kid_subsets,
            cuda=device.type == "cuda",
            workers=args.dataloader_num_workers > 0,
            cache_dir=cache_dir,
            real_name="real",
        )
        result |= {_NAMES[space][key]: value for key, value in found.items()}
    if held_out is not None:
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        losses = losses_over_timesteps(
            Denoising(scheduler),
            predictor(pipeline.unet),
            all_encoded(pipeline.vqvae, held_out, args.batch_size),
            device,
            args.batch_size,
            args.draws_per_image,
        )
        result |= {"held_out_images": len(held_out), "draws_per_image": args.draws_per_image}
        result |= {
            "held_out_loss": float(losses.mean()),
            "held_out_loss_by_timestep": loss_by_band(losses, scheduler, args.timestep_bands),
        }
    result["wall_time_s"] = round(time.perf_counter() - started, 1)
    return result


def named(folders: Sequence[str]) -> dict[str, Path]:
    """The runs by the shortest names that tell them apart: their paths below the folder that they share.

    Raises:
        ValueError: If one is named twice.
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError(f"a run is named twice: {' '.join(folders)}")
    shared = os.path.commonpath([path.parent for path in paths])
    return {path.relative_to(shared).as_posix(): path for path in paths}


def check_runs(args: argparse.Namespace, runs: Mapping[str, Path]) -> int:
    """The resolution of all runs, after each was loaded once.

    Raises:
        ValueError: If one cannot be used, or its samples are of another resolution than the first's, or than wanted.
    """
    resolution = args.resolution
    for run in runs.values():
        pipeline = load_pipeline(run)
        found = resolution_of(pipeline)
        if resolution not in (None, found):
            raise ValueError(
                f"the samples of {run} have {found} pixels in width and height, not {resolution}: leave out "
                "--resolution, and evaluate runs of different resolutions each on its own"
            )
        if (steps := pipeline.scheduler.config.num_train_timesteps) <= args.ddpm_num_inference_steps:
            raise ValueError(
                f"--ddpm_num_inference_steps {args.ddpm_num_inference_steps}: sampling takes fewer steps than the "
                f"{steps} that {run} was trained with"
            )
        if args.draws_per_image > steps:
            raise ValueError(
                f"--draws_per_image {args.draws_per_image}: {run} has {steps} timesteps, and each is seen at most once"
            )
        resolution = found
    return resolution


def output_dirs(args: argparse.Namespace, runs: Mapping[str, Path]) -> dict[str, Path]:
    """Where the results of each run go; made, if they are not there.

    Raises:
        ValueError: If one cannot be made.
    """
    if args.output_dir is None:
        result = dict(runs)
    elif len(runs) == 1:
        result = dict.fromkeys(runs, Path(args.output_dir))
    else:
        result = {name: Path(args.output_dir, name) for name in runs}
    for folder in result.values():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write to --output_dir {folder}: {error}") from error
    return result


def save_grid(samples: Tensor, path: Path) -> None:
    """Save images, shape ``(N, 3, R, R)``, uint8, in one picture."""
    to_pil_image(make_grid(samples, nrow=math.ceil(math.sqrt(len(samples))), pad_value=255)).save(path)


def save_extremes(run: Path, images: Images, count: int, path: Path) -> None:
    """Save the images that a run's scores call the easiest, over those that they call the hardest, if it has scores."""
    try:
        found = read_scores(run)
    except FileNotFoundError:
        return
    scores = dict(zip(found["name"].tolist(), found["score"].tolist(), strict=True))
    where = {name: i for i, name in enumerate(images.names) if math.isfinite(scores.get(name, math.nan))}
    ranked = sorted(where, key=lambda name: scores[name])
    count = min(count, len(ranked) // 2)
    if count:
        pictures = RealPixels(images)
        shown = torch.stack([pictures[where[name]] for name in (*ranked[:count], *ranked[-count:])])
        width = max(each for each in range(1, min(count, 16) + 1) if count % each == 0)  # easy and hard share no row
        to_pil_image(make_grid(shown, nrow=width, pad_value=255)).save(path)


def table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """The runs side by side."""
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
