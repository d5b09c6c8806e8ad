"""A diffusion transformer (DiT) that draws pictures of your classes, trained by flow matching, on fewer of them.

accelerate launch examples/train_dit.py --train_data_dir pictures --output_dir dit
accelerate launch examples/train_dit.py --train_data_dir pictures --output_dir dit --resume_from_checkpoint
accelerate launch examples/train_dit.py --train_data_dir pictures --resolution 256 --vae stabilityai/sd-vae-ft-ema ...

The pictures lie in a folder per class. The model is Peebles and Xie's (ICCV 2023), a small one without a config;
noise levels are drawn and passed as in Stable Diffusion 3 (Esser et al., ICML 2024), as timesteps of sigma x 1000.

It is an ordinary accelerate script, but for the lines that are marked:
    (+) at the end of a line: added for InfoBatch
    (-) at the start of a comment: the original line, in whose place the (+) line below it stands
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.utils import save_image
from tqdm.auto import tqdm

from infobatch_mm.diffusion import AcceleratedInfoBatch  # (+)
from infobatch_mm.diffusion.denoising import log_snr  # (+)

#: Of the model, where no config is given; patches are of 4 pixels, or of 2 x 2 latents.
SMALL = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 6}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Class-conditional image generation by flow matching")
    parser.add_argument("--train_data_dir", required=True, help="pictures in a folder per class")
    parser.add_argument("--output_dir", type=Path, default=Path("dit-model"))
    parser.add_argument("--model_config_name_or_path", help="config of a DiTTransformer2DModel; a small one without it")
    parser.add_argument("--vae", help="folder or name of an AutoencoderKL, to train in its latents; in pixels without")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--train_batch_size", type=int, default=16, help="on each process")
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--num_train_epochs", type=int, default=100)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--lr_scheduler", default="constant")
    parser.add_argument("--lr_warmup_steps", type=int, default=500)
    parser.add_argument("--weighting_scheme", choices=["logit_normal", "none"], default="logit_normal")
    parser.add_argument("--class_dropout", type=float, default=0.1, help="share of pictures trained on without class")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="of the samples")
    parser.add_argument("--use_ema", action="store_true")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    parser.add_argument("--report_to", help="tensorboard, wandb or another tracker of accelerate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--resume_from_checkpoint", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--policy", default="infobatch", help="what to prune by: infobatch, random, none")  # (+)
    parser.add_argument("--score", default="timestep", choices=["raw", "ema", "timestep"])  # (+)
    return parser.parse_args(argv)


def build_model(config: str | None, classes: int, channels: int, size: int, patch_size: int) -> DiTTransformer2DModel:
    """A model for so many classes and pictures, or latents, of ``(channels, size, size)``."""
    settings: dict[str, Any] = {**SMALL, "patch_size": patch_size}
    if config:
        settings = DiTTransformer2DModel.load_config(config)
    fitting = {"num_embeds_ada_norm": classes, "in_channels": channels, "out_channels": channels, "sample_size": size}
    model = DiTTransformer2DModel.from_config({**settings, **fitting})
    if size % model.config.patch_size:
        raise ValueError(f"patches of {model.config.patch_size} do not fill {size} x {size}: use another --resolution")
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # each block would drop classes of its own choice
        for each in (block.norm1.linear.weight, block.norm1.linear.bias):
            nn.init.zeros_(each)  # the zero of adaLN-Zero: each block begins as the identity
    nn.init.zeros_(model.proj_out_2.weight)
    return model


@torch.no_grad()
def sample(
    model: DiTTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler, classes: Tensor, guidance_scale: float
) -> Tensor:
    """One picture, or its latents, of each class, by 25 steps of Euler with classifier-free guidance."""
    shape = (len(classes), model.config.in_channels, model.config.sample_size, model.config.sample_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(classes.device)
    either = torch.cat([classes, torch.full_like(classes, model.config.num_embeds_ada_norm)])
    scheduler.set_timesteps(25, device=classes.device)
    for timestep in scheduler.timesteps:
        velocity = model(torch.cat([x, x]), timestep.expand(len(either)), either).sample
        conditional, unconditional = velocity.chunk(2)
        x = scheduler.step(unconditional + guidance_scale * (conditional - unconditional), timestep, x).prev_sample
    return x


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
    steps = [transforms.Resize(args.resolution), transforms.CenterCrop(args.resolution)]
    steps += [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    dataset = ImageFolder(args.train_data_dir, transforms.Compose(steps))
    vae, channels, size = None, 3, args.resolution
    if args.vae:
        vae = AutoencoderKL.from_pretrained(args.vae).requires_grad_(False).eval().to(accelerator.device)
        channels, size = vae.config.latent_channels, size // 2 ** (len(vae.config.block_out_channels) - 1)
    patch_size = 2 if args.vae else 4
    model = build_model(args.model_config_name_or_path, len(dataset.classes), channels, size, patch_size)
    noise_scheduler = FlowMatchEulerDiscreteScheduler()
    if args.use_ema:
        ema_model = EMAModel(model.parameters(), use_ema_warmup=True)
        ema_model.to(accelerator.device)
        accelerator.register_for_checkpointing(ema_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
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
    # (-) model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
    model, optimizer, train_dataloader, lr_scheduler = infobatch.prepare(  # (+)
        model, optimizer, train_dataloader, lr_scheduler
    )
    if args.report_to:
        accelerator.init_trackers("train_dit")

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
        model.train()
        updates = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        progress_bar = tqdm(total=updates, disable=not accelerator.is_local_main_process, desc=f"Epoch {epoch}")
        batches = accelerator.skip_first_batches(train_dataloader, skipped) if skipped else train_dataloader
        skipped = 0
        for images, classes in batches:
            clean = images if vae is None else vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(clean)
            density = compute_density_for_timestep_sampling(args.weighting_scheme, len(clean), 0.0, 1.0)
            drawn = (density * noise_scheduler.config.num_train_timesteps).long()
            timesteps = noise_scheduler.timesteps[drawn].to(clean.device)
            sigmas = (timesteps / noise_scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
            noisy = (1 - sigmas) * clean + sigmas * noise
            dropped = torch.rand(classes.shape, device=classes.device) < args.class_dropout
            with accelerator.accumulate(model):
                predicted = model(noisy, timesteps, classes.masked_fill(dropped, len(dataset.classes))).sample
                losses = F.mse_loss(predicted.float(), noise - clean, reduction="none").mean(dim=(1, 2, 3))
                # (-) loss = losses.mean()
                loss = infobatch.weigh(losses, log_snr=log_snr(noise_scheduler, timesteps))  # (+)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
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
                ema_model.step(model.parameters())
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
        trained = accelerator.unwrap_model(model).eval()
        if args.use_ema:
            ema_model.copy_to(trained.parameters())
        trained.save_pretrained(args.output_dir / "transformer")
        noise_scheduler.save_pretrained(args.output_dir / "scheduler")
        (args.output_dir / "classes.json").write_text(json.dumps(dataset.classes))
        shown = torch.arange(8 * min(4, len(dataset.classes)), device=accelerator.device) // 8
        samples = sample(trained, noise_scheduler, shown, args.guidance_scale)
        pictures = samples if vae is None else vae.decode(samples / vae.config.scaling_factor).sample
        save_image(pictures.clamp(-1, 1), args.output_dir / "samples.png", normalize=True, value_range=(-1, 1))
    infobatch.write(args.output_dir, names=[path for path, _ in dataset.samples])  # (+)
    accelerator.end_training()


if __name__ == "__main__":
    main()
