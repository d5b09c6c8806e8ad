"""A diffusion model of your pictures, trained as diffusers' example of this name does it, on fewer of them.

accelerate launch examples/train_unconditional.py --train_data_dir pictures --output_dir ddpm
accelerate launch examples/train_unconditional.py --train_data_dir pictures --output_dir ddpm --resume_from_checkpoint
accelerate launch --multi_gpu --num_processes 2 examples/train_unconditional.py --train_data_dir pictures ...

It is an ordinary accelerate script, but for the lines that are marked:
    (+) at the end of a line: added for InfoBatch
    (-) at the start of a comment: the original line, in whose place the (+) line below it stands
Without a GPU, several processes meet over gloo, also under --multi_gpu; accelerate's --cpu starts a single one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm.auto import tqdm

from infobatch_mm.diffusion import AcceleratedInfoBatch  # (+)
from infobatch_mm.diffusion.denoising import log_snr  # (+)


class Pictures(Dataset):
    """All pictures below a directory, in the order of their paths, with values in [-1, 1]."""

    def __init__(self, root: Path, resolution: int) -> None:
        endings = Image.registered_extensions()
        self.paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in endings)
        steps = [transforms.Resize(resolution), transforms.CenterCrop(resolution), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input": self.transform(Image.open(self.paths[index]).convert("RGB"))}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Unconditional image generation")
    parser.add_argument("--train_data_dir", type=Path, required=True, help="pictures, also in directories below it")
    parser.add_argument("--output_dir", type=Path, default=Path("ddpm-model"))
    parser.add_argument("--model_config_name_or_path", help="config of a UNet2DModel; a small one without it")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--train_batch_size", type=int, default=16, help="on each process")
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--num_epochs", type=int, default=100)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--lr_scheduler", default="cosine")
    parser.add_argument("--lr_warmup_steps", type=int, default=500)
    parser.add_argument("--use_ema", action="store_true")
    parser.add_argument("--ddpm_num_steps", type=int, default=1000)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    parser.add_argument("--logger", help="tensorboard, wandb or another tracker of accelerate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--resume_from_checkpoint", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--policy", default="infobatch", help="what to prune by: infobatch, random, none")  # (+)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_args(argv)
    epochs = args.num_epochs
    accelerator = Accelerator(
        cpu=not getattr(torch, "accelerator", torch.cuda).is_available(),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.logger,
        project_dir=args.output_dir,
    )
    set_seed(args.seed)
    if args.model_config_name_or_path:
        model = UNet2DModel.from_config(UNet2DModel.load_config(args.model_config_name_or_path))
    else:
        model = UNet2DModel(
            sample_size=args.resolution,
            layers_per_block=1,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        )
    noise_scheduler = DDPMScheduler(num_train_timesteps=args.ddpm_num_steps)
    if args.use_ema:
        ema_model = EMAModel(model.parameters(), use_ema_warmup=True)
        ema_model.to(accelerator.device)
        accelerator.register_for_checkpointing(ema_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    dataset = Pictures(args.train_data_dir, args.resolution)
    train_dataloader = DataLoader(
        dataset, batch_size=args.train_batch_size, shuffle=True, num_workers=args.dataloader_num_workers
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=math.ceil(len(train_dataloader) / args.gradient_accumulation_steps) * epochs,
    )
    pruning = {"policy": args.policy, "score": "timestep", "item_seed": True}  # (+)
    infobatch = AcceleratedInfoBatch(accelerator, train_dataloader, epochs, **pruning)  # (+)
    # (-) model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
    model, optimizer, train_dataloader, lr_scheduler = infobatch.prepare(  # (+)
        model, optimizer, train_dataloader, lr_scheduler
    )
    if args.logger:
        accelerator.init_trackers("train_unconditional")

    global_step, first_epoch = 0, 0
    # (-) resume_step = 0
    if args.resume_from_checkpoint:
        checkpoints = args.output_dir.glob("checkpoint-*")
        last = max(checkpoints, key=lambda path: int(path.name.split("-")[1]))
        accelerator.load_state(str(last))
        global_step = int(last.name.split("-")[1])
        # (-) updates_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        # (-) first_epoch, resume_step = divmod(global_step, updates_per_epoch)
        first_epoch = infobatch.passes_done  # (+)

    for epoch in range(first_epoch, epochs):
        model.train()
        updates = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        progress_bar = tqdm(total=updates, disable=not accelerator.is_local_main_process, desc=f"Epoch {epoch}")
        # (-) skipped = resume_step * args.gradient_accumulation_steps if epoch == first_epoch else 0
        # (-) for batch in accelerator.skip_first_batches(train_dataloader, skipped):
        for batch in train_dataloader:  # (+)
            clean_images = batch["input"]
            noise = torch.randn_like(clean_images)
            steps = noise_scheduler.config.num_train_timesteps
            timesteps = torch.randint(steps, (len(clean_images),), device=clean_images.device)
            noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
            with accelerator.accumulate(model):
                predicted = model(noisy_images, timesteps).sample.float()
                # (-) loss = F.mse_loss(predicted, noise)
                noise_levels = log_snr(noise_scheduler, timesteps)  # (+)
                loss = infobatch.weigh(F.mse_loss(predicted, noise, reduction="none"), log_snr=noise_levels)  # (+)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            # (-) logs = {"loss": loss.item(), "lr": lr_scheduler.get_last_lr()[0]}
            logs = {"loss": infobatch.loss.item(), "lr": lr_scheduler.get_last_lr()[0], **infobatch.logs()}  # (+)
            progress_bar.set_postfix(loss=logs["loss"], lr=logs["lr"])
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
        unet = accelerator.unwrap_model(model)
        if args.use_ema:
            ema_model.copy_to(unet.parameters())
        DDPMPipeline(unet=unet, scheduler=noise_scheduler).save_pretrained(args.output_dir)
    infobatch.write(args.output_dir, names=[str(path) for path in dataset.paths])  # (+)
    accelerator.end_training()


if __name__ == "__main__":
    main()
