"""Data and networks of `normalisation.py`: cells of nuclei images with a UNet, CIFAR-10 with a small ResNet."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from normalisation_remedies import Draw, make_norm
from PIL import Image
from torch import Tensor, nn


@dataclass(frozen=True)
class Task:
    """A data set in memory.

    Args:
        train_x (Tensor): Shape ``(N, H, W, 3)``, uint8.
        train_y (Tensor): Shape ``(N, H, W)`` or ``(N,)``, uint8.
        test_x (Tensor): As ``train_x``.
        test_y (Tensor): As ``train_y``.
        crop (int): Side of a training crop.
        classes (int): Number of classes.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    crop: int
    classes: int

    def batch(self, indices: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Random crops and flips of training samples: inputs ``(B, 3, crop, crop)``, float32, and labels, int64."""
        index, dense = torch.from_numpy(indices), self.train_y.ndim > 1
        rows, columns = (self._places(len(index), flips, rng) for flips in (dense, True))
        at = index[:, None, None], rows[:, :, None], columns[:, None, :]
        return _floats(self.train_x[at]), self.train_y[at if dense else index].long()

    def whole(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Test samples, not cropped."""
        return _floats(self.test_x[start:stop]), self.test_y[start:stop].long()

    def _places(self, count: int, flips: bool, rng: np.random.Generator) -> Tensor:
        """Rows (or columns) of a crop for each sample, shape ``(count, crop)``."""
        places = rng.integers(0, self.train_x.shape[1] - self.crop + 1, (count, 1)) + np.arange(self.crop)
        flipped = rng.random(count) < 0.5 * flips
        places[flipped] = places[flipped, ::-1]
        return torch.from_numpy(places)


def _floats(images: Tensor) -> Tensor:
    """Bring uint8 ``(B, H, W, 3)`` to ``(B, 3, H, W)`` in memory format ``channels_last``, a quarter faster here."""
    return ((images.float() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)


def load_task(name: str, source: str | None) -> Task:
    """Read the data of a task.

    Args:
        name (str): ``"nuclei"`` or ``"cifar"``.
        source (str, optional): Folder of the nuclei tiles, or npz file of CIFAR-10.

    Raises:
        ValueError: Where no source is given.
    """
    if source is None:
        raise ValueError(f"no data for {name}: give --data-root or NUCLEI_ROOT, --cifar or CIFAR10_NPZ")
    if name == "cifar":
        with np.load(source) as data:
            x, y, test_x, test_y = (torch.from_numpy(data[key]) for key in ("train_x", "train_y", "test_x", "test_y"))
        return Task(F.pad(x, (0, 0, 4, 4, 4, 4)), y, test_x, test_y, 32, 10)
    rng = np.random.default_rng(0)
    x, y = _quarters(Path(source), "training")
    empty = ~y.reshape(len(y), -1).any(1)
    chosen = [rng.choice(np.flatnonzero(of), k, replace=False) for of, k in ((empty, 3200), (~empty, 800))]
    picked = np.concatenate(chosen)
    test_x, test_y = _quarters(Path(source), "test")
    tested = rng.choice(len(test_x), 1600, replace=False)
    arrays = (x[picked], y[picked], test_x[tested], test_y[tested])
    train_x, train_y, held_x, held_y = (torch.from_numpy(array) for array in arrays)
    return Task(train_x, train_y, held_x, held_y, 56, 3)


def _quarters(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The four 64x64 quarters of each 128x128 tile, images and labels."""
    paths = sorted((root / "images" / split).glob("*.jpg"))
    if not paths:
        raise ValueError(f"{root / 'images' / split} holds no .jpg file")
    x = np.stack([np.asarray(Image.open(path)) for path in paths])
    labels = (root / "annotations" / split / f"{path.stem}.png" for path in paths)
    y = np.stack([np.asarray(Image.open(path)) for path in labels])
    corners = [(slice(i, i + 64), slice(j, j + 64)) for i in (0, 64) for j in (0, 64)]
    return np.concatenate([x[:, r, c] for r, c in corners]), np.concatenate([y[:, r, c] for r, c in corners])


#: Activations of the UNet.
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class UNet(nn.Module):
    """Four levels, two 3x3 convolutions each; gives the last layer's input and the logits."""

    def __init__(self, width: int, classes: int, norm: str, draw: Draw, bound: float, activation: str) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]

        def block(ins: int, outs: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for a in (ins, outs):
                layers += [nn.Conv2d(a, outs, 3, padding=1, bias=False), make_norm(norm, outs, draw, bound)]
                layers += [ACTIVATIONS[activation]()]
            return nn.Sequential(*layers)

        self.down = nn.ModuleList(block(a, b) for a, b in zip([3, *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(block(a + b, a) for a, b in pairwise(widths))
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            kept.append(x)
        for level in reversed(range(len(self.up))):
            x = self.up[level](torch.cat([kept[level], F.interpolate(x, scale_factor=2.0)], 1))
        return x, self.last(x)


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, ins: int, outs: int, stride: int, norm: str, draw: Draw, bound: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(ins, outs, 3, stride, 1, bias=False),
            make_norm(norm, outs, draw, bound),
            nn.ReLU(inplace=True),
            nn.Conv2d(outs, outs, 3, 1, 1, bias=False),
            make_norm(norm, outs, draw, bound),
        )
        self.short = nn.Identity() if stride == 1 and ins == outs else nn.Conv2d(ins, outs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.body(x))


class ResNet(nn.Module):
    """One residual block at each of three widths; gives the last layer's input and the logits, with an axis of one."""

    def __init__(self, width: int, classes: int, norm: str, draw: Draw, bound: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.body = nn.Sequential(
            make_norm(norm, width, draw, bound),
            nn.ReLU(inplace=True),
            Residual(width, width, 1, norm, draw, bound),
            Residual(width, 2 * width, 2, norm, draw, bound),
            Residual(2 * width, 4 * width, 2, norm, draw, bound),
        )
        self.last = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(self.stem(x)).mean((2, 3))
        return features, self.last(features)


def build(
    task: str, width: int, classes: int, norm: str, draw: Draw, bound: float, activation: str = "relu"
) -> nn.Module:
    """Build the network of a task; ``width`` is its first layers'."""
    if task == "nuclei":
        model: nn.Module = UNet(width, classes, norm, draw, bound, activation)
    else:
        model = ResNet(width, classes, norm, draw, bound)
    return model.to(memory_format=torch.channels_last)
