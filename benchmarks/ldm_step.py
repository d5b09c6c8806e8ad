"""Cost of pruning in a step of latent-diffusion training on accelerate, and what encoding the images once saves.

    python benchmarks/ldm_step.py [RECIPE] [--vae DIR] [--rounds 60]

Steps of the same UNet alternate: as a script without us makes them, on cached latents; the same through
AcceleratedInfoBatch; with noise drawn per image besides, as tools/train_ldm.py does; and, without us again, on images
that the first stage encodes at each visit. Each includes its batch from a loader. The figures are medians of the ratios
to the first, within a round, and their quartiles. Images are drawn on the spot, as large as the recipe's; without
--vae the first stage is as wide as latent diffusion's VQ-f4 is, with random weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel, VQModel
from torch import Tensor
from torch.utils.data import DataLoader

from infobatch_mm.demo.shapes import draw_dataset
from infobatch_mm.diffusion import AcceleratedInfoBatch
from infobatch_mm.diffusion.denoising import draw
from infobatch_mm.diffusion.first_stage import FirstStage, check_fits, latent_shape, load_first_stage, moments
from infobatch_mm.diffusion.image_checks import fingerprint_images
from infobatch_mm.diffusion.images import ImageFolder
from infobatch_mm.diffusion.latents import cache_latents
from infobatch_mm.diffusion.options import parse_options

ROOT = Path(__file__).parents[1]
DEFAULT = ROOT / "configs/ldm/ldm_unet-tiny-vq-f2_1xb16-infobatch-10e_demo-32px.yaml"
NUM_IMAGES = 256


def first_stage_of(name: str | None, shrinks: int) -> FirstStage:
    """The first stage of that name, or one of random weights."""
    if name is not None:
        return load_first_stage(name)
    widths = (128, 256, 512)[: shrinks.bit_length()]
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=2,
        num_vq_embeddings=64,
    ).eval()


def endless(loader: Any) -> Iterator[Any]:
    """Batches of pass after pass."""
    while True:
        yield from loader


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Cost of a step of latent-diffusion training")
    parser.add_argument("recipe", nargs="?", default=str(DEFAULT), help="recipe of tools/train_ldm.py")
    parser.add_argument("--vae", help="first stage; by default one of random weights")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    args = parse_options(["--config", options.recipe, "--train_data_dir=.", "--vae=.", "--output_dir=."])
    shrinks = args.resolution // args.unet_config["sample_size"]
    torch.manual_seed(0)
    vae = first_stage_of(options.vae, shrinks)
    check_fits(vae, args.unet_config, args.resolution)
    accelerator = Accelerator()
    with tempfile.TemporaryDirectory() as folder:
        draw_dataset(f"{folder}/images", num_train=NUM_IMAGES, num_val=0, size=args.resolution)
        images = ImageFolder(f"{folder}/images", args.resolution, center_crop=True)
        vae.to(accelerator.device)
        cached = cache_latents(images, fingerprint_images(images), vae, f"{folder}/latents", accelerator)
        results = measure(args, options.rounds, accelerator, vae, images, cached)
    host = results.pop("host, cached latents")
    print(f"host, cached latents: {statistics.median(host) * 1e3:.1f} ms a step of {args.train_batch_size}")
    for name, seconds in results.items():
        ratios = np.array(seconds) / np.array(host)
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        print(f"{name}: x {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


def measure(
    args: argparse.Namespace, rounds: int, accelerator: Accelerator, vae: FirstStage, images: Any, cached: Any
) -> dict[str, list[float]]:
    """Seconds of each kind of step, round by round."""
    plain = DataLoader(cached, args.train_batch_size, shuffle=True, drop_last=True)
    encoding = DataLoader(images, args.train_batch_size, shuffle=True, drop_last=True)
    ours = DataLoader(cached, args.train_batch_size, shuffle=True, drop_last=True)
    infobatch = AcceleratedInfoBatch(accelerator, ours, 10**6, delta=1.0, item_seed=True)
    unet = UNet2DModel.from_config(args.unet_config)
    optimizer = torch.optim.AdamW(unet.parameters(), args.learning_rate)
    unet, optimizer, ours = infobatch.prepare(unet, optimizer, ours)
    plain, encoding = accelerator.prepare(plain, encoding)
    scheduler = DDPMScheduler()
    shape, device = latent_shape(vae, args.resolution), accelerator.device

    def update(latents: Tensor, noise: Tensor, timesteps: Tensor, weighed: bool) -> None:
        predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps).sample
        if weighed:
            loss = infobatch.weigh(F.mse_loss(predicted, noise, reduction="none"))
        else:
            loss = F.mse_loss(predicted, noise)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # as the log does; and waits for the device

    def chance(latents: Tensor) -> tuple[Tensor, Tensor]:
        return torch.randn_like(latents), torch.randint(1000, (len(latents),), device=device)

    batches = {each: endless(each) for each in (plain, ours, encoding)}

    def host() -> None:
        latents = next(batches[plain])["latents"]
        update(latents, *chance(latents), weighed=False)

    def pruned() -> None:
        latents = next(batches[ours])["latents"]
        update(latents, *chance(latents), weighed=True)

    def pruned_drawn() -> None:
        latents = next(batches[ours])["latents"]
        drawn = draw(infobatch.index.tolist(), shape, 1000, 0, infobatch.passes_done)
        update(latents, drawn.noise.to(device), drawn.timesteps.to(device), weighed=True)

    def encoded() -> None:
        latents, _ = moments(vae, next(batches[encoding])["pixel_values"])
        update(latents, *chance(latents), weighed=False)

    kinds: dict[str, Callable[[], None]] = {
        "host, cached latents": host,
        "InfoBatch": pruned,
        "InfoBatch, noise drawn per image": pruned_drawn,
        "host, images encoded at each visit": encoded,
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(-2, rounds):  # two rounds of warm-up
        order = list(kinds)
        order = order[turn % len(order) :] + order[: turn % len(order)]
        for name in order:
            begin = time.perf_counter()
            kinds[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


if __name__ == "__main__":
    main()
