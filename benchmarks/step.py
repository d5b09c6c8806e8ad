"""Cost of weighing: one training step with the loss views on, against the host's own step.

    python benchmarks/step.py [CONFIG] [--crop 64] [--batch-size 8] [--pairs 60]

Steps of the same model on the same batch alternate; the figure is the median of the paired ratios.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from paired import paired_steps

DEFAULT = Path(__file__).parents[1] / "configs/demo/fcn_r18-tiny_1xb8-1k_demo-96x96.py"


def random_batch(batch_size: int, crop: int, num_classes: int) -> tuple[torch.Tensor, list[SegDataSample]]:
    """Random images, shape (B, 3, crop, crop), and labels."""
    samples = []
    for _ in range(batch_size):
        sample = SegDataSample(metainfo=dict(img_shape=(crop, crop), ori_shape=(crop, crop)))
        sample.gt_sem_seg = PixelData(data=torch.randint(0, num_classes, (1, crop, crop)))
        samples.append(sample)
    return torch.randn(batch_size, 3, crop, crop), samples


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="cost of weighing a training step")
    parser.add_argument("config", nargs="?", default=str(DEFAULT))
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=60)
    args = parser.parse_args()

    torch.manual_seed(0)
    cfg = Config.fromfile(args.config)
    init_default_scope("mmseg")
    model = MODELS.build(cfg.model).train()
    images, samples = random_batch(args.batch_size, args.crop, model.decode_head.num_classes)
    weights = torch.rand(args.batch_size) + 0.5

    def loss() -> torch.Tensor:
        return model.parse_losses(model.loss(images, samples))[0]

    pairs = paired_steps(model, loss, weights, lr=1e-3, most=args.pairs, least=args.pairs, warm_up=5)
    ratios = sorted(on / off for on, off in pairs)
    host = statistics.median(off for _, off in pairs)
    quartiles = statistics.quantiles(ratios, n=4)
    print(
        f"{Path(args.config).stem}: host step {host * 1e3:.1f} ms, with weighing x {statistics.median(ratios):.3f} "
        f"(quartiles {quartiles[0]:.3f}-{quartiles[2]:.3f}, {args.pairs} pairs, {torch.get_num_threads()} threads)"
    )


if __name__ == "__main__":
    main()
