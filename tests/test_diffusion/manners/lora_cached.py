"""A LoRA of Stable Diffusion's UNet in the manner of diffusers' scripts that cache latents before they train.

``--cache index`` keeps an entry for each picture; ``--cache step``, as those scripts do, one for each batch of a walk.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextModel, CLIPTokenizer

from infobatch_mm.diffusion import AcceleratedInfoBatch
from infobatch_mm.diffusion.denoising import log_snr


class Captioned(Dataset):
    def __init__(self, root: Path, tokenizer: CLIPTokenizer) -> None:
        self.root = root
        self.rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
        texts = [row["text"] for row in self.rows]
        self.tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        picture = np.asarray(Image.open(self.root / self.rows[index]["file_name"]).convert("RGB"))
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 127.5 - 1
        return {"pixel_values": pixels, "input_ids": self.tokens[index]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrained_model_name_or_path", type=Path, required=True)
    parser.add_argument("--train_data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_train_epochs", type=int, default=4)
    parser.add_argument("--cache", choices=["index", "step"], default="index")
    args = parser.parse_args()
    accelerator = Accelerator(cpu=True)
    logging.basicConfig(level=logging.INFO)
    set_seed(0)
    folder = args.pretrained_model_name_or_path
    noise_scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").requires_grad_(False).eval()
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    optimizer = torch.optim.AdamW([each for each in unet.parameters() if each.requires_grad], lr=1e-3)
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    train_dataset = Captioned(args.train_data_dir, tokenizer)
    train_dataloader = DataLoader(train_dataset, shuffle=True, batch_size=4)

    moments: Any = None
    if args.cache == "index":  # in the order of the data set, before anything is prepared
        in_order = DataLoader(train_dataset, batch_size=4)
        moments = torch.cat([vae.encode(batch["pixel_values"]).latent_dist.parameters for batch in in_order])
    steps = args.num_train_epochs * len(train_dataloader)
    lr_scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=steps)
    infobatch = AcceleratedInfoBatch(accelerator, train_dataloader, args.num_train_epochs, delta=0.75, score="timestep")
    unet, optimizer, train_dataloader, lr_scheduler = infobatch.prepare(unet, optimizer, train_dataloader, lr_scheduler)
    latents_cache = []
    if args.cache == "step":
        for batch in train_dataloader:
            latents_cache.append(vae.encode(batch["pixel_values"]).latent_dist)

    right = total = 0
    for _ in range(infobatch.passes_done, args.num_train_epochs):
        for step, batch in enumerate(train_dataloader):
            if args.cache == "index":
                cached = DiagonalGaussianDistribution(moments[infobatch.index])
            else:
                cached = latents_cache[step]
            own = vae.encode(batch["pixel_values"]).latent_dist  # only to see whose the cached ones are
            if own.mean.shape == cached.mean.shape:
                right += int(torch.isclose(own.mean, cached.mean, atol=1e-4).flatten(1).all(1).sum())
            total += len(own.mean)
            latents = cached.sample()[: len(own.mean)] * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (len(latents),))
            with accelerator.accumulate(unet):
                noisy = noise_scheduler.add_noise(latents, noise, timesteps)
                predicted = unet(noisy, timesteps, text_encoder(batch["input_ids"])[0]).sample
                losses = F.mse_loss(predicted, noise, reduction="none")
                accelerator.backward(infobatch.weigh(losses, log_snr=log_snr(noise_scheduler, timesteps)))
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
    infobatch.write(args.output_dir)
    (args.output_dir / "seen.json").write_text(json.dumps({"right": right, "total": total}))
    accelerator.end_training()


if __name__ == "__main__":
    main()
