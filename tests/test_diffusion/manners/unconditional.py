"""A training script in the manner of diffusers' unconditional one: counted in steps, resumed from its last checkpoint.

Its epochs are recomputed after ``prepare``, and its loop breaks at the last step. Each step is written down.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import signal
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader, TensorDataset

from infobatch_mm.diffusion import AcceleratedInfoBatch
from infobatch_mm.diffusion.denoising import log_snr

logger = get_logger(__name__, log_level="INFO")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_train_epochs", type=int, default=100)
    parser.add_argument("--max_train_steps", type=int)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--resume_from_checkpoint")
    parser.add_argument("--kill_at", type=int, help="step after which the process kills itself")
    args = parser.parse_args()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.gradient_accumulation_steps)
    logging.basicConfig(format="%(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    set_seed(0)
    model = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    noise_scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pictures = torch.rand(46, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    train_dataset = TensorDataset(pictures * torch.linspace(0, 1, 46)[:, None, None, None])
    train_dataloader = DataLoader(train_dataset, shuffle=True, batch_size=args.train_batch_size)

    overrode_max_train_steps = False
    num_update_steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * num_update_steps_per_epoch
        overrode_max_train_steps = True
    lr_scheduler = get_scheduler(
        "cosine",
        optimizer=optimizer,
        num_warmup_steps=5 * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    infobatch = AcceleratedInfoBatch(
        accelerator, train_dataloader, max_train_steps=args.max_train_steps, score="timestep", item_seed=True
    )
    model, optimizer, train_dataloader, lr_scheduler = infobatch.prepare(
        model, optimizer, train_dataloader, lr_scheduler
    )
    # The length of the loader may have changed by prepare().
    num_update_steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    if overrode_max_train_steps:
        args.max_train_steps = args.num_train_epochs * num_update_steps_per_epoch
    args.num_train_epochs = math.ceil(args.max_train_steps / num_update_steps_per_epoch)

    global_step, first_epoch = 0, 0
    if args.resume_from_checkpoint:
        last = max(args.output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        accelerator.load_state(str(last))
        global_step, first_epoch = int(last.name.split("-")[1]), infobatch.passes_done
    written = (args.output_dir / "journal").open("a", buffering=1)
    broken = False
    for epoch in range(first_epoch, args.num_train_epochs):
        model.train()
        for (clean_images,) in train_dataloader:
            # Noise of the picture and the epoch, so that a resumed run repeats it.
            drawn = [torch.Generator().manual_seed(1000 * epoch + i) for i in infobatch.index.tolist()]
            noise = torch.stack([torch.randn(3, 8, 8, generator=each) for each in drawn])
            timesteps = torch.cat([torch.randint(1000, (1,), generator=each) for each in drawn])
            with accelerator.accumulate(model):
                predicted = model(noise_scheduler.add_noise(clean_images, noise, timesteps), timesteps).sample
                losses = F.mse_loss(predicted, noise, reduction="none")
                loss = infobatch.weigh(losses, log_snr=log_snr(noise_scheduler, timesteps))
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            line = {"index": infobatch.index.tolist(), "loss": infobatch.loss.item(), "lr": lr_scheduler.get_last_lr()}
            written.write(json.dumps(line) + "\n")
            if accelerator.sync_gradients:
                global_step += 1
                if global_step % args.checkpointing_steps == 0:
                    partial = args.output_dir / "partial"
                    infobatch.merge()
                    accelerator.save_state(str(partial))
                    partial.rename(args.output_dir / f"checkpoint-{global_step}")
                if global_step == args.kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            if global_step >= args.max_train_steps:
                broken = True
                break
    infobatch.merge()
    DDPMPipeline(accelerator.unwrap_model(model), noise_scheduler).save_pretrained(args.output_dir)
    infobatch.write(args.output_dir)
    logger.info(f"steps {global_step} of {args.max_train_steps}, broken {broken}, epochs {args.num_train_epochs}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
