"""Measures of finished latent-diffusion runs: distances of their samples to real images, and their held-out loss."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, LDMPipeline
from torch import Tensor

from .bands import check_bands, loss_by_band
from .denoising import Denoising, losses_over_timesteps, predictor
from .distances import check_counts, distances
from .encoding import all_encoded
from .features import check_inception
from .first_stage import fingerprint
from .image_checks import check_images, fingerprint_images
from .image_options import open_held_out, open_images
from .images import Images
from .pictures import save_extremes, save_grid
from .pipelines import load_pipeline, resolution_of
from .pixels import RealPixels
from .sampling import sample

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


def evaluate(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure every run, and write its numbers and pictures.

    Args:
        args (argparse.Namespace): Options of ``infobatch-mm eval-ldm``; the resolution is filled in.

    Returns:
        dict[str, dict[str, Any]]: The numbers of each run, by its name.

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
    """Take all measures of one run, and save its pictures.

    Args:
        args (argparse.Namespace): Options of ``infobatch-mm eval-ldm``.
        run (Path): Output folder of the run.
        images (Images): The real images.
        held_out (Images | None): Images whose denoising loss is measured.
        output_dir (Path): Where the pictures go.
        cache_dir (str): Where features of the real images are kept for the next run.

    Returns:
        dict[str, Any]: The numbers, by their names in ``evaluation.json``.
    """
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
    result |= _all_distances(args, run, samples, images, device, cache_dir)
    if held_out is not None:
        result |= _held_out_losses(args, pipeline, held_out, device)
    result["wall_time_s"] = round(time.perf_counter() - started, 1)
    return result


def _all_distances(
    args: argparse.Namespace, run: Path, samples: Tensor, images: Images, device: torch.device, cache_dir: str
) -> dict[str, float]:
    """Compute the distances in the first stage's features, and in Inception's where its weights are given."""
    result: dict[str, float] = {}
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
    return result


def _held_out_losses(
    args: argparse.Namespace, pipeline: LDMPipeline, held_out: Images, device: torch.device
) -> dict[str, Any]:
    """Measure the denoising loss of held-out images, overall and by noise level."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    losses = losses_over_timesteps(
        Denoising(scheduler),
        predictor(pipeline.unet),
        all_encoded(pipeline.vqvae, held_out, args.batch_size),
        device,
        args.batch_size,
        args.draws_per_image,
    )
    return {
        "held_out_images": len(held_out),
        "draws_per_image": args.draws_per_image,
        "held_out_loss": float(losses.mean()),
        "held_out_loss_by_timestep": loss_by_band(losses, scheduler, args.timestep_bands),
    }


def named(folders: Sequence[str]) -> dict[str, Path]:
    """Name the runs by the shortest names that tell them apart: their paths below the folder that they share.

    Raises:
        ValueError: If one is named twice.
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError(f"a run is named twice: {' '.join(folders)}")
    shared = os.path.commonpath([path.parent for path in paths])
    return {path.relative_to(shared).as_posix(): path for path in paths}


def check_runs(args: argparse.Namespace, runs: Mapping[str, Path]) -> int:
    """Load each run once, before hours are spent on the first, and find the resolution that they share.

    Returns:
        int: Width and height of all samples in pixels.

    Raises:
        ValueError: If a run cannot be used, or its samples have another resolution than the first run's, or than
            ``--resolution``.
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
    """Choose where the results of each run go, and make these folders.

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
