"""Cost of the hook in a training step, against the host's own step.

    python benchmarks/step.py [CONFIG] [--size 64] [--batch-size 8] [--pairs 60] [--score gradient]

Steps of the same model on the same batch alternate; the figure is the median of the paired ratios. A step with the hook
looks the batch's weights up, weighs its losses and records its scores, as in a run; a step without is the host's own
preprocessing, forward and backward pass and update. Loading data is in neither.
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
from paired import paired_steps
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
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--score", default="raw", help="what samples are scored by: raw, gradient, ...")
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
    most = args.pairs
    pairs = paired_steps(model, loss, weights, lr=1e-3, most=most, least=most, warm_up=5, score=args.score)
    ratios = sorted(on / off for on, off in pairs)
    host = statistics.median(off for _, off in pairs)
    quartiles = statistics.quantiles(ratios, n=4)
    print(
        f"{Path(args.config).stem}: host step {host * 1e3:.1f} ms, with the hook x {statistics.median(ratios):.3f} "
        f"(quartiles {quartiles[0]:.3f}-{quartiles[2]:.3f}, {args.pairs} pairs, {torch.get_num_threads()} threads)"
    )


if __name__ == "__main__":
    main()
