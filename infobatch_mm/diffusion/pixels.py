"""Images as pixel values from 0 to 255."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .images import Images


def to_uint8(images: Tensor) -> Tensor:
    """Bring images of any shape from [-1, 1] to whole numbers from 0 to 255; exact where they were such numbers."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class RealPixels(Dataset):
    """Images as torch-fidelity takes them: shape ``(3, R, R)``, uint8; the middle of each, not mirrored.

    Args:
        images (Images): N of them.
    """

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return to_uint8(self.images.fixed(index))
