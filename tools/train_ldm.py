"""Train an unconditional latent-diffusion model, pruned by InfoBatch, on a folder of images.

python tools/train_ldm.py --config configs/ldm/RECIPE.yaml --train_data_dir DIR --vae DIR --output_dir DIR
accelerate launch tools/train_ldm.py --config ... --resume_from_checkpoint latest
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _images import open_held_out, open_images
from _ldm_options import parse_options
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import DDIMScheduler, DDPMScheduler, LDMPipeline, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from infobatch_mm.core import build_policy
from infobatch_mm.core.score_rule import build_score
from infobatch_mm.core.summary import differences
from infobatch_mm.diffusion import AcceleratedInfoBatch
from infobatch_mm.diffusion.denoising import Denoising, Draws, draw, held_out_loss, log_snr
from infobatch_mm.diffusion.first_stage import check_fits, fingerprint, latent_shape, load_first_stage, moments
from infobatch_mm.diffusion.images import Images, check_images, fingerprint_images
from infobatch_mm.diffusion.latents import CachedLatents, cache_latents

#: Within a checkpoint: the options of its run.
IDENTITY_FILE = "train_ldm.json"
#: In the output folder: what was measured at the end.
METRICS_FILE = "metrics.json"
#: Options that a resumed run may change.
_FREE = {
    *("config", "output_dir", "cpu", "train_data_dir", "dataset_name", "eval_data_dir", "vae", "latents_dir"),
    *("dataset_config_name", "cache_dir", "vae_scaling_factor"),  # the first stage's fingerprint holds it
    "max_train_steps",  # of other batches they are as long in other numbers, which AcceleratedInfoBatch compares
    *("cache_latents", "dataloader_num_workers", "mixed_precision", "train_batch_size", "gradient_accumulation_steps"),
    *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "logger", "save_images_epochs"),
    *("eval_batch_size", "ddpm_num_inference_steps"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_options(argv)
    try:
        train(args)
    except ValueError as error:
        sys.exit(f"train_ldm.py: {error}")


def train(args: argparse.Namespace) -> None:
    """Train, or go on with, the model that the options describe; leave its pipeline, samples and summary behind.

    Raises:
        ValueError: If images, first stage, options and checkpoint do not fit together.
    """
    output_dir = Path(args.output_dir)
    checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint)
    # What is out of range is refused before anything is read.
    policy = build_policy(args.policy, args.prune_ratio, args.delta, args.prune_quantile)
    build_score(args.score, args.score_ema)
    noise_scheduler = DDPMScheduler(
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        beta_start=args.ddpm_beta_start,
        beta_end=args.ddpm_beta_end,
        prediction_type=args.prediction_type,
        clip_sample=False,  # latents are no pixels: they leave [-1, 1]
    )
    denoising = Denoising(noise_scheduler, args.snr_gamma)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to --output_dir {output_dir}: {error}") from error
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.logger == "none" else args.logger,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        # An order that a resumed run repeats, also where nothing is pruned.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )

    if accelerator.log_with == [] and args.logger != "none":
        raise ValueError(f"--logger {args.logger} is not installed: install it, or use --logger none")
    vae = load_first_stage(args.vae).to(accelerator.device)
    if args.vae_scaling_factor is not None:
        vae.register_to_config(scaling_factor=args.vae_scaling_factor)
    check_fits(vae, args.unet_config, args.resolution)
    with torch.device("meta"):
        UNet2DModel.from_config(args.unet_config)  # refuses settings that make no model
    identity = run_identity(args, fingerprint(vae))
    if checkpoint is not None:
        check_identity(checkpoint, identity)
    images = open_images(args)
    check_images(images)
    global_batch = args.train_batch_size * accelerator.num_processes
    if global_batch > len(images):
        raise ValueError(
            f"one global batch holds {global_batch} images but there are only {len(images)}: use a smaller "
            "--train_batch_size"
        )
    seen = fingerprint_images(images)
    if accelerator.is_main_process:
        warn_of_scale(vae, images)
    held_out = open_held_out(args)
    dataset: Images | CachedLatents = images
    if args.cache_latents:
        cache_dir = Path(args.latents_dir or output_dir / "latents")
        dataset = cache_latents(
            images, seen, vae, cache_dir, accelerator, args.train_batch_size, args.dataloader_num_workers
        )
    loader = DataLoader(
        dataset,
        args.train_batch_size,
        shuffle=True,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
    )
    set_seed(args.seed)  # here, so that the model is the same whether or not images were encoded before
    unet = UNet2DModel.from_config(args.unet_config)
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        args.learning_rate,
        (args.adam_beta1, args.adam_beta2),
        args.adam_epsilon,
        args.adam_weight_decay,
    )
    infobatch = AcceleratedInfoBatch(
        accelerator,
        loader,
        args.num_epochs,
        max_train_steps=args.max_train_steps,
        policy=policy,
        seed=args.seed,
        item_seed=True,
        score=args.score,
        score_ema=args.score_ema,
        fingerprint=seen,
    )
    lr_scheduler = build_lr_scheduler(args, optimizer, len(dataset), accelerator.num_processes)
    unet, optimizer, loader, lr_scheduler = infobatch.prepare(unet, optimizer, loader, lr_scheduler)
    model = accelerator.unwrap_model(unet)
    ema = None
    if args.use_ema:
        ema = EMAModel(model.parameters(), args.ema_max_decay)
        accelerator.register_for_checkpointing(ema)
    if checkpoint is not None:
        infobatch.check_output(output_dir)
        accelerator.load_state(str(checkpoint))
        if accelerator.is_main_process:
            set_aside(output_dir, checkpoint)
    if ema is not None:
        ema.to(accelerator.device)  # a checkpoint's is on the CPU
    if args.logger != "none":
        accelerator.init_trackers("train_ldm", loggable(args))

    shape = latent_shape(vae, args.resolution)
    bar = tqdm(initial=infobatch.updates_done, total=infobatch.updates_expected, unit="update")
    bar.disable = not accelerator.is_local_main_process
    for epoch in range(infobatch.passes_done, infobatch.num_passes):
        unet.train()
        for step, batch in enumerate(loader):
            if step == 0:
                bar.total = infobatch.updates_expected  # each pass knows better how many are left
            drawn = draw(infobatch.index.tolist(), shape, args.ddpm_num_steps, args.seed, epoch)
            latents = to_latents(vae, batch, drawn)
            noise, timesteps = drawn.noise.to(latents.device), drawn.timesteps.to(latents.device)
            with accelerator.accumulate(unet):
                losses, scores = denoising.losses(predictor(unet), latents, noise, timesteps)
                accelerator.backward(infobatch.weigh(losses, scores, log_snr=log_snr(noise_scheduler, timesteps)))
                if accelerator.sync_gradients and args.max_grad_norm:
                    accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            if ema is not None:
                ema.step(model.parameters())
            update = infobatch.updates_done
            scalars = {"loss": infobatch.loss.item(), "lr": lr_scheduler.get_last_lr()[0]}
            accelerator.log(scalars, step=update)
            bar.set_postfix(scalars, refresh=False)
            bar.update(update - bar.n)
            if update % args.checkpointing_steps == 0:
                save_checkpoint(accelerator, infobatch, args, identity, images.names)
        accelerator.log(infobatch.logs(), step=infobatch.updates_done)
        is_last = epoch + 1 == infobatch.num_passes
        if args.save_images_epochs and (is_last or (epoch + 1) % args.save_images_epochs == 0):
            with averaged(model, ema):
                if accelerator.is_main_process:
                    grid = output_dir / "samples" / f"{epoch + 1:04d}.png"
                    save_samples(build_pipeline(vae, model, noise_scheduler), args, grid)
    bar.close()

    infobatch.merge()
    infobatch.write(output_dir, images.names)
    if accelerator.is_main_process:
        with averaged(model, ema):
            build_pipeline(vae, model, noise_scheduler).save_pretrained(output_dir)
            if held_out is not None:
                items = all_encoded(vae, held_out, args.train_batch_size)
                loss = held_out_loss(denoising, predictor(model), items, accelerator.device)
                (output_dir / METRICS_FILE).write_text(json.dumps({"held_out_loss": loss}) + "\n")
                print(f"held-out denoising loss {loss:.6f}")
        summary = infobatch.summary()
        print(
            f"{summary['visits']} of {summary['visits_full']} visits, saved {summary['saved_ratio']:.1%}, "
            f"{summary['iterations']} iterations, {summary['wall_time_s']:.0f} s"
        )
    accelerator.end_training()


def predictor(unet: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """From noisy latents and timesteps to what the UNet says of them."""
    return lambda noisy, timesteps: unet(noisy, timesteps).sample


@torch.no_grad()
def to_latents(vae: nn.Module, batch: dict[str, Tensor], drawn: Draws) -> Tensor:
    """The latents of a batch, which may be encoded already; shape ``(B, C, h, w)``."""
    if "latents" in batch:
        return batch["latents"]
    mean, std = moments(vae, batch["pixel_values"])
    return mean if std is None else mean + std * drawn.posterior.to(mean.device)


def warn_of_scale(vae: nn.Module, images: Images) -> None:
    """Say so if latents are far from the unit variance that the noise schedule is made for."""
    spread = float(encoded(vae, images, range(0, len(images), math.ceil(len(images) / 16))).std())
    if not 0.5 < spread < 2:
        print(
            f"the latents have a standard deviation of {spread:.2f}, and noise one of 1: with a scaling_factor of "
            f"{vae.config.scaling_factor / spread:.4g} in the config of the first stage, not "
            f"{vae.config.scaling_factor:.4g}, it would be 1"
        )


@torch.no_grad()
def encoded(vae: nn.Module, images: Images, indices: Sequence[int]) -> Tensor:
    """The latents of some images, without chance; shape ``(len(indices), C, h, w)``."""
    pixels = torch.stack([images.fixed(index) for index in indices])
    return moments(vae, pixels.to(next(vae.parameters()).device))[0]


def all_encoded(vae: nn.Module, images: Images, batch_size: int) -> list[dict[str, Tensor]]:
    """The latents of all images, without chance, on the CPU, as items with ``latents``, shape ``(C, h, w)``."""
    parts = torch.arange(len(images)).split(batch_size)
    return [{"latents": each} for part in parts for each in encoded(vae, images, part.tolist()).cpu()]


def build_lr_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, num_samples: int, num_processes: int
) -> LambdaLR:
    """The schedule over the updates of the unpruned training; accelerate steps it once per process at each."""
    batches = math.ceil(num_samples / (args.train_batch_size * num_processes))
    updates = args.max_train_steps or args.num_epochs * math.ceil(batches / args.gradient_accumulation_steps)
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * num_processes,
        num_training_steps=updates * num_processes,
    )


def loggable(args: argparse.Namespace) -> dict[str, Any]:
    """The options as trackers take them."""
    return {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str, bool))}


def find_checkpoint(output_dir: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from, None for a new run.

    Raises:
        ValueError: If it is not there, or a new run would mix its checkpoints with those of another.
    """
    found = checkpoints(output_dir)
    if wanted is None and not found and (output_dir / "model_index.json").is_file():
        raise ValueError(f"{output_dir} holds a finished training: delete it, or name another --output_dir")
    if wanted is None:
        if found:
            raise ValueError(
                f"{output_dir} holds checkpoints of another run, the last one {found[-1].name}: go on with it by "
                "--resume_from_checkpoint latest, or name another --output_dir"
            )
        return None
    if wanted == "latest":
        if not found:
            print(f"{output_dir} holds no checkpoint: a new training begins")
        return found[-1] if found else None
    path = Path(wanted) if Path(wanted).is_dir() else output_dir / wanted
    if not path.is_dir():
        names = ", ".join(each.name for each in found) or "none"
        raise ValueError(f"there is no checkpoint {wanted}; {output_dir} holds: {names}")
    return path


def checkpoints(output_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("checkpoint-*"))
    return [output_dir / match[0] for match in sorted((each for each in found if each), key=lambda each: int(each[1]))]


def set_aside(output_dir: Path, checkpoint: Path) -> None:
    """Rename checkpoints of updates that the resumed run will make anew: they are not its own, nor its latest."""
    found = checkpoints(output_dir)
    if checkpoint in found:
        for later in found[found.index(checkpoint) + 1 :]:
            aside = later.with_name(f"{later.name}.superseded")
            shutil.rmtree(aside, ignore_errors=True)
            later.rename(aside)


def run_identity(args: argparse.Namespace, first_stage: str) -> dict[str, Any]:
    """What makes a checkpoint one of this run: its options, and the fingerprint of its first stage."""
    options = {name: value for name, value in vars(args).items() if name not in _FREE}
    if args.max_train_steps is not None:
        options["num_epochs"] = None  # not looked at
    return {"first_stage": first_stage, **options}


def check_identity(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Refuse a checkpoint of a run of other settings.

    Raises:
        ValueError: With the names and both values.
    """
    try:
        before = json.loads((checkpoint / IDENTITY_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot resume: {checkpoint} is no checkpoint of train_ldm.py: {error}") from error
    if differ := differences(before, identity):
        raise ValueError(
            f"cannot resume: {checkpoint} is of a run with other settings ({differ}); use the same, or another "
            "--output_dir"
        )


def save_checkpoint(
    accelerator: Accelerator,
    infobatch: AcceleratedInfoBatch,
    args: argparse.Namespace,
    identity: dict[str, Any],
    names: Sequence[str],
) -> None:
    """Save all of the run's state, at once: a kill leaves the checkpoint before it."""
    output_dir = Path(args.output_dir)
    final = output_dir / f"checkpoint-{infobatch.updates_done}"
    partial = output_dir / f"{final.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    infobatch.merge()
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        if args.checkpoints_total_limit is not None:
            for old in checkpoints(output_dir)[: -args.checkpoints_total_limit]:
                shutil.rmtree(old)
    infobatch.write(output_dir, names)


@contextlib.contextmanager
def averaged(model: nn.Module, ema: EMAModel | None) -> Iterator[nn.Module]:
    """The model in evaluation mode, with its averaged weights where there are any, for a while."""
    was_training = model.training
    if ema is not None:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
    try:
        yield model.eval()
    finally:
        model.train(was_training)
        if ema is not None:
            ema.restore(model.parameters())


def build_pipeline(vae: nn.Module, model: nn.Module, noise_scheduler: DDPMScheduler) -> LDMPipeline:
    """The pipeline that samples from the model, by DDIM."""
    # The last step goes to the first timestep of the schedule, as latent diffusion's own sampler does.
    sampler = DDIMScheduler.from_config(noise_scheduler.config, set_alpha_to_one=False, steps_offset=1)
    return LDMPipeline(vqvae=vae, unet=model, scheduler=sampler)


def save_samples(pipeline: LDMPipeline, args: argparse.Namespace, path: Path) -> None:
    """Save a grid of samples, from the same noise at every call."""
    pipeline.set_progress_bar_config(disable=True)
    count = args.eval_batch_size
    images = pipeline(
        count,
        generator=torch.Generator().manual_seed(args.seed),
        num_inference_steps=args.ddpm_num_inference_steps,
    ).images
    columns = max(each for each in range(1, math.isqrt(count) + 1) if count % each == 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, rows=columns, cols=count // columns).save(path)


if __name__ == "__main__":
    main()
