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
from torch import Tensor
from tqdm.auto import tqdm

from infobatch_mm.diffusion.denoising import Denoising, draw
from infobatch_mm.diffusion.latents import CachedLatents

#: A pass that no training has.
_PASS = 2**30


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
    losses = measure(LDMPipeline.from_pretrained(args.output_dir), latents, chosen, args.draws)
    expected, by_timestep = losses.mean(1), losses.mean(0)
    halves = spearmanr(losses[:, ::2].mean(1), losses[:, 1::2].mean(1)).statistic
    print(f"rank correlation of score and expected loss: {spearmanr(scores[chosen], expected).statistic:.3f}")
    print(f"of two halves of the {args.draws} draws: {halves:.3f}")
    print(f"standard deviation between images: {expected.std():.4f}, between timesteps: {by_timestep.std():.4f}")
    print(f"mean loss from the first timesteps to the last: {' '.join(f'{each:.3f}' for each in by_timestep)}")


@torch.no_grad()
def measure(pipeline: LDMPipeline, latents: CachedLatents, chosen: np.ndarray, draws: int) -> np.ndarray:
    """Loss of each image at each of its timesteps, shape ``(len(chosen), draws)``."""
    unet = pipeline.unet.eval()
    denoising = Denoising(pipeline.scheduler)
    steps = pipeline.scheduler.config.num_train_timesteps
    losses = np.zeros((len(chosen), draws))

    def model(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return unet(noisy, timesteps).sample

    for begin in tqdm(range(0, len(chosen), 64)):
        part = chosen[begin : begin + 64]
        clean = torch.stack([latents[int(index)]["latents"] for index in part])
        for repeat in range(draws):
            drawn = draw(part.tolist(), clean.shape[1:], steps, 0, _PASS, repeat)
            timesteps = (drawn.timesteps + repeat * steps) // draws
            losses[begin : begin + 64, repeat] = denoising.losses(model, clean, drawn.noise, timesteps)[1]
    return losses


if __name__ == "__main__":
    main()
