"""Samples of a latent-diffusion model: a grid of them during a training, many for an evaluation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, LDMPipeline
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core import rng
from .pipelines import resolution_of

#: Distinguishes the noise of samples from the draws of any pass.
_SAMPLES = 2**31 + 1


@contextlib.contextmanager
def averaged(model: nn.Module, ema: EMAModel | None) -> Iterator[nn.Module]:
    """Give a model its averaged weights for a while, in evaluation mode; its own weights come back in the end.

    Args:
        model (nn.Module): The model; changed in place.
        ema (EMAModel | None): The average of its weights. None leaves the weights as they are.

    Yields:
        nn.Module: The model.
    """
    was_training = model.training
    if ema is not None:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
    try:
        yield model.eval()
    finally:
        # Also after an error: training would go on from the average, and the optimiser's state fits the weights.
        model.train(was_training)
        if ema is not None:
            ema.restore(model.parameters())


def save_samples(pipeline: LDMPipeline, path: Path, count: int, num_inference_steps: int, seed: int) -> None:
    """Save a grid of samples, from the same noise at every call.

    Args:
        pipeline (LDMPipeline): On any device.
        path (Path): The picture; its folder is made.
        count (int): Samples in the grid, at least 1.
        num_inference_steps (int): Steps of DDIM.
        seed (int): Seed of the noise.
    """
    pipeline.set_progress_bar_config(disable=True)
    # A generator of its own: the global one would draw other noise in a run that was resumed.
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(count, generator=generator, num_inference_steps=num_inference_steps).images
    columns = max(each for each in range(1, math.isqrt(count) + 1) if count % each == 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, rows=columns, cols=count // columns).save(path)


def sample(
    pipeline: LDMPipeline,
    num_samples: int,
    num_inference_steps: int = 50,
    eta: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Draw samples, each from a generator of its own.

    Sample i depends on seed and i alone: neither on the batch it is drawn in (up to rounding), nor on the number of
    samples. Two models whose latents have one shape start from equal noise.

    Args:
        pipeline (LDMPipeline): On any device.
        num_samples (int): N.
        num_inference_steps (int): Steps of DDIM (Song et al., ICLR 2021). Defaults to 50.
        eta (float): 0 for deterministic steps, 1 for the steps of DDPM. Defaults to 0.
        seed (int): At least 0. Defaults to 0.
        batch_size (int): Samples at once. Defaults to 64.

    Returns:
        Tensor: Shape ``(N, 3, R, R)``, uint8, on the CPU: what the pipeline would save as PNG.
    """
    # A pipeline of our own, to change its steps: LDMPipeline gives the noise of its steps (eta > 0) no generator,
    # so that samples would depend on the batch. The caller's pipeline stays as it is.
    sampler = LDMPipeline(pipeline.vqvae, pipeline.unet, DDIMScheduler.from_config(pipeline.scheduler.config))
    sampler.set_progress_bar_config(disable=True)
    step = sampler.scheduler.step
    resolution = resolution_of(pipeline)
    samples = torch.empty(num_samples, 3, resolution, resolution, dtype=torch.uint8, device="cpu")
    bar = tqdm(total=num_samples, desc="sampling", unit="image")
    for part in torch.arange(num_samples, device="cpu").split(batch_size):
        generators = [rng.generator(seed, _SAMPLES, int(index)) for index in part]
        sampler.scheduler.step = partial(step, generator=generators)
        images = sampler(
            len(part), generators, eta=eta, num_inference_steps=num_inference_steps, output_type="np"
        ).images
        samples[part] = torch.from_numpy((images * 255).round().astype("uint8")).permute(0, 3, 1, 2)
        bar.update(len(part))
    bar.close()
    return samples
