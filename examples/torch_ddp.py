"""InfoBatch in a plain PyTorch script, in one process or many, to be killed and resumed at any step.

python examples/torch_ddp.py
torchrun --nproc_per_node 2 examples/torch_ddp.py --resume
accelerate launch --multi_gpu --num_processes 2 examples/torch_ddp.py

The lines that InfoBatch needs are marked with (1) to (7). Without a GPU the processes meet over gloo, also under
accelerate's --multi_gpu, as this script joins them by itself; accelerate's --cpu starts a single process.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import Dataset

from infobatch_mm import InfoBatch


class Stripes(Dataset):
    """Striped images of 16 x 16 in four directions, some hard to see; each visit shifts and disturbs them otherwise."""

    def __init__(self, num_samples: int, seed: int) -> None:
        drawn = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(4, (num_samples, 1, 1), generator=drawn)
        noise = torch.rand(num_samples, 1, 1, generator=drawn) * 2
        angle = self.labels * torch.pi / 4
        y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
        stripes = torch.sin(x * angle.cos() + y * angle.sin())
        self.images = stripes + noise * torch.randn(num_samples, 16, 16, generator=drawn)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index].roll(tuple(np.random.randint(16, size=2).tolist()), (0, 1))
        return (image + 0.1 * torch.randn_like(image))[None], self.labels[index, 0, 0]

    def __len__(self) -> int:
        return len(self.labels)


def main(argv: Sequence[str] | None = None, on_step: Callable[[InfoBatch, Tensor], None] | None = None) -> nn.Module:
    """Train as the command line says; ``on_step`` is called with each batch's indices before it is weighed."""
    parser = argparse.ArgumentParser(description="InfoBatch in a plain PyTorch script")
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="over all processes")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=Path("torch_ddp.pt"))
    parser.add_argument("--interval", type=int, default=50, help="steps from checkpoint to checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    args = parser.parse_args(argv)

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:  # started by torchrun or accelerate
        dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0

    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 4)).to(device)
    model = DistributedDataParallel(net, [device] if on_gpu else None) if dist.is_initialized() else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    data = Stripes(args.samples, seed=0)
    # (1) After the process group, equal on every process. item_seed: augmentations repeat after a resume.
    infobatch = InfoBatch(len(data), args.epochs, prune_ratio=0.5, batch_size=args.batch_size, seed=0, item_seed=True)
    # (2) Its loader gives every process its share of each pass; no DistributedSampler, no set_epoch.
    loader = infobatch.loader(data, num_workers=args.workers)
    # (3) A schedule for the unpruned training, stepped by progress: a pruned pass takes it as far as a full one.
    scheduler = infobatch.schedule(CosineAnnealingLR(optimizer, args.epochs * len(loader)))
    step = 0
    if args.resume:
        saved = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        infobatch.load_state_dict(saved["infobatch"])  # (4) on as many processes as you like
        step = saved["step"]

    for _ in range(infobatch.passes_done, args.epochs):  # (5) the first may be the rest of a pass
        for index, (images, labels) in loader:  # (6) the index stays on the CPU
            if on_step is not None:
                on_step(infobatch, index)
            losses = F.cross_entropy(model(images.to(device)), labels.to(device), reduction="none")
            infobatch.weigh(losses, index).backward()  # (7) one loss per sample in, a scalar out
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step += 1
            if step % args.interval == 0:
                infobatch.merge()  # (4) on all processes, then one of them writes
                if rank == 0:
                    parts = {"model": net, "optimizer": optimizer, "scheduler": scheduler}
                    state = {name: part.state_dict() for name, part in parts.items()} | {"step": step}
                    partial = args.checkpoint.with_suffix(".tmp")
                    torch.save({**state, "infobatch": infobatch.state_dict()}, partial)
                    os.replace(partial, args.checkpoint)  # at once: a kill leaves the last one whole
    if rank == 0:
        test = Stripes(1000, seed=1)
        correct = net(test.images[:, None].to(device)).argmax(1).cpu() == test.labels.flatten()
        saved_ratio = infobatch.summary()["saved_ratio"]
        print(f"kept {1 - saved_ratio:.1%}, saved {saved_ratio:.1%}, accuracy {correct.float().mean():.1%}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return net


if __name__ == "__main__":
    main()
