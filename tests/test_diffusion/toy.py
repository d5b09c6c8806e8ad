"""A small training on accelerate that writes down what it sees, in one process or in each of several."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from diffusers.optimization import get_scheduler
from launching import forget_accelerators
from torch import Tensor
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset

from infobatch_mm.diffusion import AcceleratedInfoBatch

#: Steps of every scheduler that diffusers and torch users take; piecewise_constant has its own rules.
SCHEDULERS = [
    *("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("piecewise_constant", "OneCycleLR", "CosineAnnealingLR"),
]


@dataclass(frozen=True)
class Setup:
    """A training; ``policy=None`` is accelerate alone, ``ddp=False`` trains a model of its own on each process."""

    samples: int = 46
    batch_size: int = 4
    epochs: int = 8
    steps: int | None = None  # updates of the unpruned training, in place of the epochs
    policy: str | None = "infobatch"
    prune_ratio: float = 0.5
    shuffle: bool = True
    drop_last: bool = False
    workers: int = 0
    accumulate: int = 1
    split: bool = False
    dispatch: bool = False
    even: bool = True
    seedable: bool = False
    scheduler: str = "cosine"
    too_short: int = 0  # steps that the schedule lacks
    noise: bool = False  # drawn from the global generator, in the items and in the loop
    item_seed: bool = False
    ddp: bool = True
    more: dict[str, Any] = field(default_factory=dict)  # arguments of AcceleratedInfoBatch


class Points(Dataset):
    """Points on a plane, some far off it; each says its index."""

    def __init__(self, samples: int, noise: bool = False) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.x = torch.randn(samples, 4, generator=drawn)
        self.y = self.x.sum(1, keepdim=True) + torch.rand(samples, 1, generator=drawn) ** 3 * 4
        self.noise = noise

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = self.x[index] + 0.1 * torch.randn(4) if self.noise else self.x[index]
        return {"index": index, "x": x, "y": self.y[index]}

    def __len__(self) -> int:
        return len(self.x)


class Run:
    """All objects of one training.

    Attributes:
        journal (list): One entry per step of this process.
        at_pass_end (list): Learning rate after each pass.
    """

    def __init__(self, setup: Setup) -> None:
        forget_accelerators()
        self.setup = setup
        self.accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=setup.accumulate,
            dataloader_config=DataLoaderConfiguration(
                split_batches=setup.split,
                dispatch_batches=setup.dispatch or None,
                even_batches=setup.even,
                use_seedable_sampler=setup.seedable,
            ),
        )
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        loader = DataLoader(
            Points(setup.samples, setup.noise),
            batch_size=setup.batch_size,
            shuffle=setup.shuffle,
            drop_last=setup.drop_last,
            num_workers=setup.workers,
        )
        scheduler = build_scheduler(setup, optimizer, self.accelerator, loader)
        torch.manual_seed(100 + self.accelerator.process_index)  # noise is each process's own
        self.infobatch: AcceleratedInfoBatch | None = None
        prepare: Callable = self.accelerator.prepare
        if setup.policy is not None:
            self.infobatch = AcceleratedInfoBatch(
                self.accelerator, loader, setup.epochs, setup.prune_ratio, policy=setup.policy,
                item_seed=setup.item_seed, max_train_steps=setup.steps, **setup.more,
            )  # fmt: skip
            prepare = self.infobatch.prepare
        if setup.ddp:
            self.model, self.optimizer, self.loader, self.scheduler = prepare(model, optimizer, loader, scheduler)
        else:
            self.optimizer, self.loader, self.scheduler = prepare(optimizer, loader, scheduler)
            self.model = model
        self.journal: list[dict[str, Any]] = []
        self.at_pass_end: list[float] = []

    @property
    def pruner(self) -> Any:
        return self.infobatch._pruner

    def train(self, on_step: Callable[[int], bool | None] = lambda step: None) -> Run:
        """Train to the end, or until ``on_step``, which is called after each step with its number, says True."""
        ib = self.infobatch
        step = ib.summary()["iterations"] if ib else 0
        updates = 0  # of this call
        for epoch in range(ib.passes_done if ib else 0, ib.num_passes if ib else self.setup.epochs):
            for batch in self.loader:
                current = self.pruner.pass_index if ib else epoch
                x = batch["x"] + 0.1 * torch.randn_like(batch["x"]) if self.setup.noise else batch["x"]
                with self.accelerator.accumulate(self.model):
                    outputs = self.model(x)
                    losses = (outputs - batch["y"]) ** 2
                    entry = {
                        "pass": current,
                        "index": batch["index"].tolist(),
                        "losses": losses.detach().flatten().tolist(),
                    }
                    level = batch["x"][:, 0] * 3  # looked at where scores are by noise level
                    weighed = ib.weigh(losses, log_snr=level, outputs=outputs) if ib else losses.mean()
                    self.accelerator.backward(weighed)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                step += 1
                lr = self.scheduler.get_last_lr()[0]
                self.journal.append({**entry, "lr": lr, "updated": self.accelerator.sync_gradients, "step": step})
                updates += self.accelerator.sync_gradients
                if on_step(step) or (ib is None and updates == self.setup.steps):
                    return self
            self.at_pass_end.append(self.scheduler.get_last_lr()[0])
        return self

    def save(self, path: Path) -> None:
        self.infobatch.merge()
        self.accelerator.save_state(str(path))
        self.accelerator.wait_for_everyone()

    def load(self, path: Path) -> Run:
        self.accelerator.load_state(str(path))
        return self

    @property
    def parameters(self) -> list[float]:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()]).tolist()


def build_scheduler(setup: Setup, optimizer: Any, accelerator: Accelerator, loader: DataLoader) -> Any:
    """The scheduler, as long as the unpruned training by accelerate's rules."""
    world = 1 if setup.split else accelerator.num_processes
    batches = len(loader) // world if setup.drop_last else math.ceil(len(loader) / world)
    # accelerate counts the batches in between against the end of a OneCycleLR.
    accumulate = 1 if setup.scheduler == "OneCycleLR" else setup.accumulate
    updates = setup.steps or math.ceil(batches / accumulate) * setup.epochs
    total = updates * world - setup.too_short  # a step per process
    if setup.scheduler == "OneCycleLR":
        return OneCycleLR(optimizer, max_lr=0.05, total_steps=total)
    if setup.scheduler == "CosineAnnealingLR":
        return CosineAnnealingLR(optimizer, T_max=total)
    if setup.scheduler == "StepLR":
        return StepLR(optimizer, step_size=2)
    if setup.scheduler == "ChainedScheduler":
        return ChainedScheduler([StepLR(optimizer, step_size=2)])
    if setup.scheduler == "ReduceLROnPlateau":
        return ReduceLROnPlateau(optimizer)
    if setup.scheduler == "piecewise_constant":
        rules = ",".join(f"{1 / (i + 1)}:{round(total * (i + 1) / 7)}" for i in range(6))
        return get_scheduler(setup.scheduler, optimizer, step_rules=f"{rules},0.01")
    warmup = updates // (2 if setup.scheduler == "constant_with_warmup" else 10) * world
    return get_scheduler(setup.scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=total)


def plan_of(run: Run) -> tuple[Tensor, Tensor]:
    """Indices and weights of the plan in flight, or of the one about to be walked."""
    plan = run.pruner.begin_pass()
    return plan.indices, plan.weights
