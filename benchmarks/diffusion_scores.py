"""What the scores of a latent-diffusion training say about its images.

    python benchmarks/diffusion_scores.py OUTPUT_DIR --latents_dir DIR [--images 800] [--draws 16]

OUTPUT_DIR is that of a finished run of tools/train_ldm.py, DIR its cached latents. The loss of some of the images is
measured with the final model at so many timesteps, spread over the schedule. Their mean is an image's expected loss;
the rank correlation with it is what a score is worth for ranking images. Half of the draws against the other half says
how well so many draws know the expected loss themselves.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import LDMPipeline
from scipy.stats import spearmanr
from torch.utils.data import Subset

from infobatch_mm.diffusion.denoising import Denoising, losses_over_timesteps
from infobatch_mm.diffusion.latents import CachedLatents


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="What the scores of a latent-diffusion training say")
    parser.add_argument("output_dir", type=Path, help="of a finished run of tools/train_ldm.py")
    parser.add_argument("--latents_dir", type=Path, required=True, help="its cached latents")
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--draws", type=int, default=16, help="timesteps at which each is seen")
    args = parser.parse_args()

    found = np.load(args.output_dir / "infobatch_scores.npz")
    scores, names = found["score"], found["name"].tolist()
    latents = CachedLatents(args.latents_dir, names)
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(np.isfinite(scores)))[: args.images]
    pipeline = LDMPipeline.from_pretrained(args.output_dir)
    unet = pipeline.unet.eval()
    losses = losses_over_timesteps(
        Denoising(pipeline.scheduler),
        lambda noisy, timesteps: unet(noisy, timesteps).sample,
        Subset(latents, chosen.tolist()),
        torch.device("cpu"),
        draws_per_image=args.draws,
    ).numpy()
    expected, by_timestep = losses.mean(1), losses.mean(0)
    halves = spearmanr(losses[:, ::2].mean(1), losses[:, 1::2].mean(1)).statistic
    print(f"rank correlation of score and expected loss: {spearmanr(scores[chosen], expected).statistic:.3f}")
    print(f"of two halves of the {args.draws} draws: {halves:.3f}")
    print(f"standard deviation between images: {expected.std():.4f}, between timesteps: {by_timestep.std():.4f}")
    print(f"mean loss from the first timesteps to the last: {' '.join(f'{each:.3f}' for each in by_timestep)}")


if __name__ == "__main__":
    main()
