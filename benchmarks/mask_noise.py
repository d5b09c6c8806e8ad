"""How much a masked autoencoder's loss of an image says about the image: one draw of the mask against many.

    NUCLEI_ROOT=... python benchmarks/mask_noise.py [--config CONFIG] [--data FOLDER] [--epochs 40] [--draws 32]

Trains the model of a config, pruned by the last loss, with a cosine schedule of its own. After some epochs the weights
are held and some images go through it again and again, once with a new mask each time, once with a new crop as well.
Compared with the mean over the latter, by Spearman's rank correlation and by the share of images that both put on the
same side of the mean, which is what InfoBatch prunes by: single draws; the scores that training has left; averages of
them (``score_ema``).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, set_random_seed
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from infobatch_mm import InfoBatch
from infobatch_mm.core import ScoreStore

CONFIG = Path(__file__).parents[1] / "configs/mae/mae_vit-tiny-p8_1xb64-coslr-40e_nuclei-64px.py"
AVERAGES = (0.0, 0.5, 0.8, 0.9)


def losses_of(model: nn.Module, data: dict) -> Tensor:
    """MAE's loss of each image, shape ``(B,)``: the mean over its own masked patches."""
    images = model.data_preprocessor(data, True)["inputs"]
    latent, mask, ids_restore = model.backbone(images)
    errors = (model.neck(latent, ids_restore) - model.head.construct_target(images)) ** 2
    return (errors.mean(2) * mask).sum(1) / mask.sum(1)


def drawn(model: nn.Module, batches: Iterable[dict], draws: int) -> np.ndarray:
    """Losses of the same images, draw by draw, shape ``(draws, images)``."""
    with torch.no_grad():
        return np.stack([torch.cat([losses_of(model, data) for data in batches]).numpy() for _ in range(draws)])


def own_share(draws: np.ndarray) -> float:
    """Share of the variance of single draws that lies between what was drawn for (one-way analysis of variance)."""
    within = draws.var(axis=0, ddof=1).mean()
    between = max(0.0, draws.mean(axis=0).var(ddof=1) - within / len(draws))
    return between / (between + within)


def look(model: nn.Module, chosen: DataLoader, stores: dict[float, ScoreStore], draws: int, epoch: int) -> Table:
    """What single draws and the scores of training know of the images, with the model's weights held."""
    of_masks = drawn(model, list(chosen), draws)
    of_both = drawn(model, chosen, draws)
    truth = of_both.mean(0)
    of_crops, of_images = own_share(of_masks), own_share(of_both)
    reliability = of_images * draws / (1 + of_images * (draws - 1))  # Spearman-Brown: of the mean of all draws
    title = (
        f"after epoch {epoch}; of the variance of one draw, {of_crops:.1%} lies between crops where the mask is drawn, "
        f"{of_images:.1%} between images where the crop is too; of the mean of {draws}, {reliability:.1%}; "
        f"{np.mean(truth < truth.mean()):.1%} of the images are below the mean"
    )
    table = Table("score", "rank correlation", "same side of the mean", title=title)

    def add(name: str, values: np.ndarray, others: np.ndarray = truth) -> None:
        agree = float(np.mean((values < values.mean()) == (others < others.mean())))
        table.add_row(name, f"{float(spearmanr(values, others).statistic):.3f}", f"{agree:.1%}")

    add(f"one draw of the mask, against the mean of {draws - 1} others", of_masks[0], of_masks[1:].mean(0))
    add(f"one draw of mask and crop, against the mean of {draws - 1} others", of_both[0], of_both[1:].mean(0))
    for average, store in stores.items():
        store.flush()
        name = "the last visit's loss" if average == 0 else f"score_ema={average}"
        add(f"{name}, against the mean of {draws} draws", store.values[chosen.dataset.indices].numpy())
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="rank correlation of one draw of the mask with many")
    parser.add_argument("--config", type=Path, default=CONFIG, help="an MAE pre-training by epochs, without the hook")
    parser.add_argument("--data", help="folder of images, in place of the config's")
    parser.add_argument("--epochs", type=int, help="default: the config's")
    parser.add_argument("--looks", type=int, nargs="+", help="epochs after which to look (default: a quarter, all)")
    parser.add_argument("--draws", type=int, default=32)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--prune-ratio", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    cfg = Config.fromfile(args.config)
    epochs, batch_size = args.epochs or cfg.train_cfg.max_epochs, cfg.train_dataloader.batch_size
    looks = args.looks or [epochs // 4, epochs]
    MMLogger.get_current_instance().setLevel("ERROR")
    if cfg.model.head.loss.criterion != "L2":
        parser.error(f"{args.config} has another criterion than L2")
    init_default_scope("mmpretrain")
    set_random_seed(args.seed)
    if args.data is not None:
        cfg.train_dataloader.dataset.update(data_root=args.data, data_prefix="")
    dataset = Runner.build_dataloader(cfg.train_dataloader, seed=args.seed).dataset
    images = np.linspace(0, len(dataset) - 1, min(args.images, len(dataset))).round().astype(int).tolist()
    chosen = DataLoader(Subset(dataset, images), 250, collate_fn=default_collate)
    model = MODELS.build(cfg.model).train()
    model.init_weights()
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    warm_up = epochs / 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: min((epoch + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * epoch / epochs))
    )
    infobatch = InfoBatch(len(dataset), epochs, args.prune_ratio, seed=args.seed, batch_size=batch_size)
    loader = DataLoader(infobatch.attach(dataset), batch_size, sampler=infobatch.sampler, collate_fn=default_collate)
    stores = {average: ScoreStore(len(dataset), average) for average in AVERAGES}
    for epoch in track(range(1, epochs + 1), "training"):
        for index, data in loader:
            losses = losses_of(model, data)
            infobatch.weigh(losses, index).backward()
            optimizer.step()
            optimizer.zero_grad()
            for store in stores.values():
                store.record(index, losses)
        schedule.step()
        if epoch in looks:
            Console(width=120).print(look(model, chosen, stores, args.draws, epoch))


if __name__ == "__main__":
    main()
