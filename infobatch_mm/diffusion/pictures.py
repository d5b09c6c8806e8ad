"""Pictures of an evaluation: samples in a grid, and the images of the lowest and the highest scores."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ..core import read_scores
from .images import Images
from .pixels import RealPixels


def save_grid(samples: Tensor, path: Path) -> None:
    """Save images in one picture, about as high as wide.

    Args:
        samples (Tensor): Shape ``(N, 3, R, R)``, uint8.
        path (Path): The picture.
    """
    to_pil_image(make_grid(samples, nrow=math.ceil(math.sqrt(len(samples))), pad_value=255)).save(path)


def save_extremes(run: Path, images: Images, count: int, path: Path) -> None:
    """Save the images that a run's scores call the easiest, above the images that they call the hardest.

    Nothing is saved where the run has no scores, or none of these images.

    Args:
        run (Path): Output folder of the run.
        images (Images): The images that it was trained on.
        count (int): Images of each kind; fewer where there are fewer than two times as many with a score.
        path (Path): The picture.
    """
    try:
        found = read_scores(run)
    except FileNotFoundError:
        return
    scores = dict(zip(found["name"].tolist(), found["score"].tolist(), strict=True))
    where = {name: i for i, name in enumerate(images.names) if math.isfinite(scores.get(name, math.nan))}
    ranked = sorted(where, key=lambda name: scores[name])
    count = min(count, len(ranked) // 2)
    if count:
        pictures = RealPixels(images)
        shown = torch.stack([pictures[where[name]] for name in (*ranked[:count], *ranked[-count:])])
        width = max(each for each in range(1, min(count, 16) + 1) if count % each == 0)  # easy and hard share no row
        to_pil_image(make_grid(shown, nrow=width, pad_value=255)).save(path)
