"""Cost of the hook in a training step, against the host's own step.

    python benchmarks/step.py [CONFIG] [--size 64] [--batch-size 8] [--rounds 60] [--scores raw gradient]

Each round makes one step of every kind on the same model and batch, in random order: the host's own, and one for each
score. Figures are medians and quartiles of the ratios within a round. A step with the hook looks the batch's weights
up, weighs its losses and records its scores, as in a run; a step without is the host's own preprocessing, forward and
backward pass and update. Loading data is in neither.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from paired import steps_in_turn
from torch import nn

DEFAULT = Path(__file__).parents[1] / "configs/demo/fcn_r18-tiny_1xb8-1k_demo-96x96.py"


def segmentation_samples(model: nn.Module, batch_size: int, size: int) -> list[Any]:
    """Random labels for each pixel."""
    from mmseg.structures import SegDataSample

    samples = [SegDataSample(metainfo=dict(img_shape=(size, size), ori_shape=(size, size))) for _ in range(batch_size)]
    for sample in samples:
        sample.gt_sem_seg = PixelData(data=torch.randint(0, model.decode_head.num_classes, (1, size, size)))
    return samples


def image_samples(model: nn.Module, batch_size: int, size: int) -> list[Any]:
    """Random labels, where the head has classes; a masked autoencoder has none."""
    from mmpretrain.structures import DataSample

    samples = [DataSample() for _ in range(batch_size)]
    if hasattr(model.head, "num_classes"):
        for sample in samples:
            sample.set_gt_label(int(torch.randint(0, model.head.num_classes, ())))
    return samples


SAMPLES = {"mmseg": segmentation_samples, "mmpretrain": image_samples}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="cost of the hook in a training step")
    parser.add_argument("config", nargs="?", default=str(DEFAULT), help="of MMSegmentation or MMPretrain")
    parser.add_argument("--size", type=int, default=64, help="width and height of the images")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--scores", nargs="+", default=["raw"], help="what samples are scored by: raw, gradient, ...")
    args = parser.parse_args()

    torch.manual_seed(0)
    cfg = Config.fromfile(args.config)
    scope = cfg.get("default_scope", "mmengine")
    if scope not in SAMPLES:
        parser.error(f"{args.config} has default_scope={scope!r}: choose one of {', '.join(SAMPLES)}")
    init_default_scope(scope)
    cfg.model.setdefault("data_preprocessor", cfg.get("data_preprocessor"))
    model = MODELS.build(cfg.model).train()
    images = torch.randint(0, 256, (args.batch_size, 3, args.size, args.size), dtype=torch.uint8)
    if cfg.train_dataloader.get("collate_fn", {}).get("type") != "default_collate":
        images = list(images)
    samples = SAMPLES[scope](model, args.batch_size, args.size)

    def loss() -> torch.Tensor:
        batch = model.data_preprocessor(dict(inputs=images, data_samples=samples), True)
        return model.parse_losses(model.loss(**batch))[0]

    weights = torch.rand(args.batch_size) + 0.5
    most = args.rounds
    rounds = steps_in_turn(model, loss, weights, lr=1e-3, most=most, least=most, warm_up=5, scores=args.scores)
    host = statistics.median(each["host"] for each in rounds)
    print(f"{Path(args.config).stem}: host step {host * 1e3:.1f} ms, {most} rounds, {torch.get_num_threads()} threads")
    for score in args.scores:
        line = [f"  score={score!r}: x {spread(rounds, score, 'host')} of the host's"]
        line += [f"x {spread(rounds, score, other)} of {other!r}" for other in args.scores[: args.scores.index(score)]]
        print(", ".join(line))


def spread(rounds: list[dict[str, float]], kind: str, other: str) -> str:
    """Median and quartiles of the ratio of two kinds of steps."""
    low, middle, high = statistics.quantiles([each[kind] / each[other] for each in rounds], n=4)
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


if __name__ == "__main__":
    main()
