"""What a score taken from mixed images knows about a sample: rank correlation with the sample's true loss.

    python benchmarks/mixed_scores.py CIFAR10_NPZ [--epochs 10] [--passes 8]

A small ResNet is trained under Mixup and CutMix. Then, with the weights held, every image goes through so many
passes of mixed batches, and the scores that different rules make of them are compared with its mean cross entropy over
as many unmixed views: by Spearman's rank correlation, of one pass and of the mean over all, and by the share of samples
that both put on the same side of the mean, which is what InfoBatch prunes by.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, set_random_seed
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn

from infobatch_mm.engine.loader import IndexedLoader
from infobatch_mm.losses import LossWeigher, attach_views

CONFIG = Path(__file__).parents[1] / "configs/resnet/resnet18-tiny_1xb128-30e_cifar10-npz.py"
AUGMENTS = dict(augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)])
UNMIXED = "loss of one unmixed view"


def mixed_scores(model: nn.Module, weigher: LossWeigher, data: dict) -> Iterator[tuple[str, Tensor]]:
    """Scores of a batch by each rule, shape ``(B,)``, from one draw of the augmentation."""
    weigher.begin(torch.ones(len(data["inputs"])), pruned=False)
    batch = model.data_preprocessor(data, True)
    shares = weigher.shares
    assert shares is not None  # the preprocessor has mixed
    model.loss(**batch)
    ours, _ = weigher.end()
    with weigher.suspended():
        logits = model(batch["inputs"])
    target = torch.stack([sample.gt_score for sample in batch["data_samples"]])
    loss = nn.functional.cross_entropy(logits, target, reduction="none")
    above = loss - torch.special.entr(target).sum(1)
    yield "loss of the image to its own sample", loss
    yield "loss by shares", shares.T @ loss
    yield "loss above the target's entropy to its own sample", above
    yield "loss above the target's entropy, by shares (ours)", ours
    yield "|target - p| of the image to its own sample", (target - logits.softmax(1)).abs().sum(1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="rank correlation of scores under mixing with true losses")
    parser.add_argument("npz", help="images and labels: see NpzDataset")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--passes", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    cfg = Config.fromfile(CONFIG)
    cfg.train_dataloader.dataset.ann_file = args.npz
    init_default_scope("mmpretrain")
    set_random_seed(args.seed)
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=args.seed)
    model = MODELS.build({**cfg.model, "train_cfg": AUGMENTS, "data_preprocessor": cfg.data_preprocessor}).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=args.epochs * len(loader))
    for _ in track(range(args.epochs), "training"):
        for data in loader:
            model.parse_losses(model.loss(**model.data_preprocessor(data, True)))[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 0.0  # scores are taken in training mode, and nothing is learned any more
    weigher = LossWeigher()
    attach_views(model, weigher)
    indexed = IndexedLoader(loader)
    scores: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((args.passes, len(loader.dataset))))
    with torch.no_grad():
        for p in track(range(args.passes), "scoring"):
            for data in indexed:
                where = indexed.current.indices
                labels = torch.cat([sample.gt_label for sample in data["data_samples"]])
                plain = model(model.data_preprocessor(data, False)["inputs"])
                scores[UNMIXED][p, where] = nn.functional.cross_entropy(plain, labels, reduction="none")
                for rule, values in mixed_scores(model, weigher, data):
                    scores[rule][p, where] = values
    report(scores)


def report(scores: dict[str, np.ndarray]) -> None:
    """The rules side by side."""
    passes = len(scores[UNMIXED])
    table = Table("score", "one pass", f"mean of {passes}", "same side of the mean, one pass")
    for rule, values in scores.items():
        # One unmixed view is compared with the mean of the others.
        truth = scores[UNMIXED][1:].mean(0)
        one, many = (float(spearmanr(each, truth).statistic) for each in (values[0], values.mean(0)))
        agree = float(np.mean((values[0] < values[0].mean()) == (truth < truth.mean())))
        table.add_row(rule, f"{one:.3f}", "" if rule == UNMIXED else f"{many:.3f}", f"{agree:.1%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
