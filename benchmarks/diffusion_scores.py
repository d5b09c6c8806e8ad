"""What scores of a latent-diffusion training know of its images.

    python benchmarks/diffusion_scores.py OUTPUT_DIR [OUTPUT_DIR ...] --latents_dir DIR [--images 800] [--truth 64]

OUTPUT_DIR is where a run of tools/train_ldm.py has finished, DIR its cached latents. With the final model held, some of
the images are visited as in so many passes, each time at one random timestep, and scored by the package's own store:
the last loss (raw), its average over the visits (ema), the average of its share of the mean at its noise level
(timestep). Each is compared with the images' expected loss, the mean over many timesteps spread over the schedule: by
rank, and by which images the lowest quantile holds, of which a policy skips some. Two expected losses are told apart:
of the loss, to which the timesteps of little noise contribute most, and of its share, to which all contribute alike.

Whether such a ranking is worth having is another question, and the second table's. Skipping a share r of the lowest
quantile q and weighing the rest of it by 1 / (1 - r) leaves the mean gradient as it is and adds variance: for an image
that may be skipped, r / (1 - r) times the squared norm of its gradient. Pruning as much at random does so for all
images alike. The ranking is worth having if it adds less, that is if the images outside the quantile have squared norms
that are larger enough: about twice as large with the defaults.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import LDMPipeline
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import tqdm

from infobatch_mm.core import ScoreStore, read_scores
from infobatch_mm.diffusion.denoising import Denoising, draw, in_part, log_snr
from infobatch_mm.diffusion.latents import CachedLatents
from infobatch_mm.scores import SCORES
from infobatch_mm.scores.noise_levels import NoiseLevels

#: A seed that no training has.
SEED = 2**30
BATCH = 100


class Looks:
    """Losses of images at draws of timestep and noise, with a model held.

    Attributes:
        losses (Tensor): Shape ``(images, draws)``, float32.
        levels (Tensor): Log-SNR of each, of the same shape.
    """

    def __init__(self, pipeline: LDMPipeline, latents: Tensor, draws: int, spread: bool) -> None:
        unet, denoising = pipeline.unet.eval(), Denoising(pipeline.scheduler)
        total = pipeline.scheduler.config.num_train_timesteps
        columns = []
        for number in tqdm(range(draws), "spread draws" if spread else "visits", leave=False):
            drawn = draw(range(len(latents)), latents.shape[1:], total, SEED, number, int(spread))
            timesteps = in_part(drawn.timesteps, number, draws, total) if spread else drawn.timesteps
            losses = []
            for part in torch.arange(len(latents)).split(BATCH):
                with torch.no_grad():
                    _, found = denoising.losses(
                        lambda noisy, t: unet(noisy, t).sample, latents[part], drawn.noise[part], timesteps[part]
                    )
                losses.append(found)
            columns.append((torch.cat(losses), log_snr(pipeline.scheduler, timesteps)))
        self.losses = torch.stack([losses for losses, _ in columns], 1)
        self.levels = torch.stack([levels for _, levels in columns], 1)

    def scored(self, score: str, visits: Sequence[int]) -> np.ndarray:
        """Scores after these visits, by the package's own store."""
        store = ScoreStore(len(self.losses), score=score)
        for visit in visits:
            store.record(torch.arange(len(self.losses)), self.losses[:, visit], log_snr=self.levels[:, visit])
            store.settle()
        return store.values.numpy()

    def shares(self) -> np.ndarray:
        """Each loss as a share of the mean at its noise level over all images and draws."""
        levels = NoiseLevels()
        levels.hold(torch.arange(self.losses.numel()), self.losses.flatten(), self.levels.flatten())
        return levels.settle()[1].reshape(self.losses.shape).numpy()


def squared_gradients(pipeline: LDMPipeline, latents: Tensor, draws: int) -> np.ndarray:
    """Squared norm of the gradient of each image's loss at timesteps spread over the schedule, ``(images, draws)``."""
    unet, denoising = pipeline.unet.eval(), Denoising(pipeline.scheduler)
    total = pipeline.scheduler.config.num_train_timesteps
    parameters = [each for each in unet.parameters() if each.requires_grad]
    result = np.zeros((len(latents), draws))
    for number in tqdm(range(draws), "gradients", leave=False):
        drawn = draw(range(len(latents)), latents.shape[1:], total, SEED, number, 2)
        timesteps = in_part(drawn.timesteps, number, draws, total)
        for i in range(len(latents)):
            one = slice(i, i + 1)
            losses, _ = denoising.losses(
                lambda noisy, t: unet(noisy, t).sample, latents[one], drawn.noise[one], timesteps[one]
            )
            gradients = torch.autograd.grad(losses[0], parameters)
            result[i, number] = sum(float(each.square().sum()) for each in gradients)
    return result


def added_variance(ranked: np.ndarray, squares: np.ndarray, quantile: float, prune_ratio: float) -> tuple[float, float]:
    """What pruning by a ranking adds to the variance of the gradient, in units of pruning as much at random.

    Returns:
        tuple[float, float]: That, and the mean squared norm outside the lowest quantile over that within it.
    """
    order = np.argsort(ranked)
    count = round(quantile * len(order))
    low, high = squares[order[:count]].mean(), squares[order[count:]].mean()
    saved = quantile * prune_ratio
    at_random = saved / (1 - saved) * squares.mean()
    return saved / (1 - prune_ratio) * low / at_random, high / low


def overlap(first: np.ndarray, second: np.ndarray, quantile: float) -> float:
    """Share of the lowest ones by the first that are among the lowest by the second too."""
    count = round(quantile * len(first))
    return len(set(np.argsort(first)[:count]) & set(np.argsort(second)[:count])) / count


def look(folder: Path, latents_dir: Path, args: argparse.Namespace, console: Console) -> None:
    """Measure one run."""
    found = read_scores(folder)
    cached = CachedLatents(latents_dir, found["name"].tolist())
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(np.isfinite(found["score"])))[: args.images]
    latents = torch.stack([cached[int(i)]["latents"] for i in chosen])
    pipeline = LDMPipeline.from_pretrained(folder)
    truth, visits = Looks(pipeline, latents, args.truth, True), Looks(pipeline, latents, args.visits, False)
    losses, shares = truth.losses.numpy(), truth.shares()
    expected, expected_share, by_timestep = losses.mean(1), shares.mean(1), losses.mean(0)

    def rank(first: np.ndarray, second: np.ndarray) -> float:
        return float(spearmanr(first, second).statistic)

    halves = [rank(each[:, ::2].mean(1), each[:, 1::2].mean(1)) for each in (losses, shares)]
    scores = {score: visits.scored(score, range(8)) for score in SCORES}
    below = {
        name: f"{np.mean(each < each.mean()):.0%}" for name, each in (("expected loss", expected), *scores.items())
    }
    for line in (
        f"[bold]{folder}[/bold], {len(chosen)} images at {args.truth} timesteps",
        f"rank correlations: halves of the expected loss {halves[0]:.2f}, halves of its share {halves[1]:.2f}, the"
        f" one with the other {rank(expected, expected_share):.2f}",
        f"standard deviation between images {expected.std():.4f}, between timesteps {by_timestep.std():.4f}",
        f"mean loss from the first timesteps to the last: {' '.join(f'{each:.3f}' for each in by_timestep[::8])}",
        f"below the mean: {', '.join(f'{name} {share}' for name, share in below.items())} (scores of 8 visits)",
    ):
        console.print(line, highlight=False)
    table = Table("score", "visits", "rank, expected loss", "rank, its share", f"lowest {args.quantile:.0%} shared")
    for score in SCORES:
        for count in (1, 2, 4, 8):
            groups = [range(start, start + count) for start in range(0, args.visits - count + 1, count)]
            each = [visits.scored(score, group) for group in groups]
            table.add_row(
                score,
                str(count),
                f"{np.mean([rank(values, expected) for values in each]):.3f}",
                f"{np.mean([rank(values, expected_share) for values in each]):.3f}",
                f"{np.mean([overlap(values, expected, args.quantile) for values in each]):.1%}",
            )
    own = found["score"][chosen]
    table.add_section()
    table.add_row(
        "the run's own",
        f"{found['times_seen'].mean():.0f}",
        f"{rank(own, expected):.3f}",
        f"{rank(own, expected_share):.3f}",
        f"{overlap(own, expected, args.quantile):.1%}",
    )
    console.print(table)
    if not args.gradients:
        return
    squares = squared_gradients(pipeline, latents, 2 * args.gradients)
    judged, squares = squares[:, ::2].mean(1), squares[:, 1::2].mean(1)
    table = Table("ranked by", "rank, squared gradient", "outside / within", "added variance, random = 1")
    rankings = {f"{score}, 8 visits": values for score, values in scores.items()}
    rankings |= {"the run's own score": own, "the expected loss": expected, "its share": expected_share}
    for name, values in {**rankings, "other draws' squared gradient": judged}.items():
        variance, ratio = added_variance(values, squares, args.quantile, args.prune_ratio)
        table.add_row(name, f"{rank(values, squares):.3f}", f"{ratio:.2f}", f"{variance:.2f}")
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="What scores of a latent-diffusion training know of its images")
    parser.add_argument("output_dirs", type=Path, nargs="+", help="of finished runs of tools/train_ldm.py")
    parser.add_argument("--latents_dir", type=Path, required=True, help="their cached latents")
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--truth", type=int, default=64, help="timesteps whose mean is the expected loss")
    parser.add_argument("--visits", type=int, default=16, help="random draws that scores are made of, at least 8")
    parser.add_argument("--quantile", type=float, default=0.76, help="share of the images that counts as well learned")
    parser.add_argument("--prune_ratio", type=float, default=0.5, help="share of these that is skipped")
    parser.add_argument("--gradients", type=int, default=4, help="timesteps at which gradients are taken; 0 for none")
    args = parser.parse_args()
    if args.visits < 8:
        parser.error(f"--visits {args.visits}: scores of eight visits are looked at")
    for folder in args.output_dirs:
        look(folder, args.latents_dir, args, Console(width=120))


if __name__ == "__main__":
    main()
