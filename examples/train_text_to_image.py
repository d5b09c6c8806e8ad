"""Stable Diffusion fine-tuned on your captioned pictures, as diffusers' example of this name does it, on fewer of them.

accelerate launch examples/train_text_to_image.py --pretrained_model_name_or_path MODEL --train_data_dir pictures \
    --resolution 512 --random_flip --snr_gamma 5 --output_dir sd-pictures
accelerate launch examples/train_text_to_image.py ... --resume_from_checkpoint
accelerate launch --multi_gpu --num_processes 2 examples/train_text_to_image.py ...

The captions are in pictures/metadata.jsonl: {"file_name": "a.png", "text": "..."} in each line. To try it without a
model and a network: `python -m infobatch_mm.demo.pipeline demo` makes demo/pipeline and demo/images, of 32 pixels.

It is an ordinary accelerate script, but for the lines that are marked:
    (+) at the end of a line: added for InfoBatch
    (-) at the start of a comment: the original line, in whose place the (+) line below it stands
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset, load_dataset
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from infobatch_mm.diffusion import AcceleratedInfoBatch  # (+)
from infobatch_mm.diffusion.denoising import log_snr  # (+)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fine-tuning of a text-to-image model")
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="pipeline like Stable Diffusion's")
    parser.add_argument("--train_data_dir", required=True, help="pictures and their metadata.jsonl")
    parser.add_argument("--caption_column", default="text", help="key of the captions in metadata.jsonl")
    parser.add_argument("--output_dir", type=Path, default=Path("sd-model-finetuned"))
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--center_crop", action="store_true", help="and not a random one")
    parser.add_argument("--random_flip", action="store_true")
    parser.add_argument("--train_batch_size", type=int, default=16, help="on each process")
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--num_train_epochs", type=int, default=100)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--lr_scheduler", default="constant")
    parser.add_argument("--lr_warmup_steps", type=int, default=500)
    parser.add_argument("--snr_gamma", type=float, help="gamma of Min-SNR weighting, such as 5; none without it")
    parser.add_argument("--use_ema", action="store_true")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    parser.add_argument("--report_to", help="tensorboard, wandb or another tracker of accelerate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--resume_from_checkpoint", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--policy", default="infobatch", help="what to prune by: infobatch, random, none")  # (+)
    parser.add_argument("--score", default="timestep", choices=["raw", "ema", "timestep"])  # (+)
    return parser.parse_args(argv)


def open_pictures(args: argparse.Namespace, tokenizer: CLIPTokenizer) -> Dataset:
    """Pictures with values in [-1, 1] and the tokens of their captions."""
    dataset = load_dataset("imagefolder", data_dir=args.train_data_dir, split="train")
    if args.caption_column not in dataset.column_names:
        raise ValueError(
            f"{args.train_data_dir}/metadata.jsonl gives no {args.caption_column!r}: write "
            f'{{"file_name": "a.png", "{args.caption_column}": "..."}} in a line for each picture'
        )
    crop = transforms.CenterCrop if args.center_crop else transforms.RandomCrop
    steps = [transforms.Resize(args.resolution), crop(args.resolution)]
    steps += [transforms.RandomHorizontalFlip()] if args.random_flip else []
    transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])

    def preprocess(rows: dict[str, list[Any]]) -> dict[str, Any]:
        tokens = tokenizer(rows[args.caption_column], padding="max_length", truncation=True, return_tensors="pt")
        pixels = [transform(image.convert("RGB")) for image in rows["image"]]
        return {"pixel_values": pixels, "input_ids": tokens.input_ids}

    return dataset.with_transform(preprocess)


def target_of(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the model is to predict."""
    if scheduler.config.prediction_type == "epsilon":
        return noise
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"prediction_type={scheduler.config.prediction_type!r}: use epsilon or v_prediction")


def min_snr_weights(scheduler: DDPMScheduler, timesteps: Tensor, gamma: float | None) -> Tensor:
    """Weights of the losses (Hang et al., ICCV 2023, section 3.4); ones without gamma."""
    if gamma is None:
        return torch.ones(timesteps.shape, device=timesteps.device)
    snr = compute_snr(scheduler, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_args(argv)
    epochs = args.num_train_epochs
    accelerator = Accelerator(
        cpu=not getattr(torch, "accelerator", torch.cuda).is_available(),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_dir=args.output_dir,
    )
    set_seed(args.seed)
    folder = args.pretrained_model_name_or_path
    noise_scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    for frozen in (vae, text_encoder):
        frozen.requires_grad_(False).eval().to(accelerator.device, dtype=dtype)
    if args.use_ema:
        ema_unet = EMAModel(unet.parameters())
        ema_unet.to(accelerator.device)
        accelerator.register_for_checkpointing(ema_unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate)
    with accelerator.main_process_first():
        dataset = open_pictures(args, tokenizer)
    train_dataloader = DataLoader(
        dataset, batch_size=args.train_batch_size, shuffle=True, num_workers=args.dataloader_num_workers
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=math.ceil(len(train_dataloader) / args.gradient_accumulation_steps) * epochs,
    )
    pruning = {"policy": args.policy, "score": args.score, "item_seed": True}  # (+)
    infobatch = AcceleratedInfoBatch(accelerator, train_dataloader, epochs, **pruning)  # (+)
    # (-) unet, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
    unet, optimizer, train_dataloader, lr_scheduler = infobatch.prepare(  # (+)
        unet, optimizer, train_dataloader, lr_scheduler
    )
    if args.report_to:
        accelerator.init_trackers("train_text_to_image")

    global_step, first_epoch, skipped = 0, 0, 0
    if args.resume_from_checkpoint:
        checkpoints = args.output_dir.glob("checkpoint-*")
        last = max(checkpoints, key=lambda path: int(path.name.split("-")[1]))
        accelerator.load_state(str(last))
        global_step = int(last.name.split("-")[1])
        # (-) updates_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        # (-) first_epoch, done = divmod(global_step, updates_per_epoch)
        # (-) skipped = done * args.gradient_accumulation_steps
        first_epoch = infobatch.passes_done  # (+)

    for epoch in range(first_epoch, epochs):
        unet.train()
        updates = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        progress_bar = tqdm(total=updates, disable=not accelerator.is_local_main_process, desc=f"Epoch {epoch}")
        batches = accelerator.skip_first_batches(train_dataloader, skipped) if skipped else train_dataloader
        skipped = 0
        for batch in batches:
            latents = vae.encode(batch["pixel_values"].to(dtype)).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            steps = noise_scheduler.config.num_train_timesteps
            timesteps = torch.randint(steps, (len(latents),), device=latents.device)
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
            target = target_of(noise_scheduler, latents, noise, timesteps)
            with accelerator.accumulate(unet):
                predicted = unet(noisy_latents, timesteps, text_encoder(batch["input_ids"])[0]).sample
                unweighted = F.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
                losses = unweighted * min_snr_weights(noise_scheduler, timesteps, args.snr_gamma)
                # (-) loss = losses.mean()
                loss = infobatch.weigh(losses, unweighted, log_snr(noise_scheduler, timesteps))  # (+)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            # (-) logs = {"loss": loss.item(), "lr": lr_scheduler.get_last_lr()[0]}
            logs = {"loss": infobatch.loss.item(), "lr": lr_scheduler.get_last_lr()[0]}  # (+)
            progress_bar.set_postfix(logs)
            accelerator.log(logs, step=global_step)
            if not accelerator.sync_gradients:
                continue
            if args.use_ema:
                ema_unet.step(unet.parameters())
            progress_bar.update(1)
            global_step += 1
            if global_step % args.checkpointing_steps == 0:
                partial = args.output_dir / "partial-checkpoint"  # so that a kill leaves no half of one
                infobatch.merge()  # (+)
                accelerator.save_state(str(partial))
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    partial.rename(args.output_dir / f"checkpoint-{global_step}")
        progress_bar.close()

    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(unet)
        if args.use_ema:
            ema_unet.copy_to(trained.parameters())
        StableDiffusionPipeline.from_pretrained(folder, unet=trained).save_pretrained(args.output_dir)
    infobatch.write(args.output_dir, names=[row["path"] for row in dataset.data.to_pydict()["image"]])  # (+)
    accelerator.end_training()


if __name__ == "__main__":
    main()
