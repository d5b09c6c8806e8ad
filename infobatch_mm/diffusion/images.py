"""Images to train on: from a folder or from a data set of the hub, in the form that diffusers' examples give them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

try:
    from PIL import Image, ImageOps
    from torchvision import transforms
    from torchvision.transforms import functional as F
except ImportError as error:
    raise ImportError(
        "infobatch_mm.diffusion.images needs torchvision and Pillow: pip install 'infobatch_mm[diffusers]'"
    ) from error


class Images(Dataset):
    """Images of one resolution: what :class:`ImageFolder` and :class:`HubImages` have in common.

    Args:
        names (list[str]): A name for each image.
        resolution (int): Width and height R of the items in pixels, at least 1. The short side is resized to it.
        center_crop (bool): Whether to take the middle of what is not square; otherwise a random part at each visit.
            Defaults to False.
        random_flip (bool): Whether to mirror every second visit, at random. Defaults to False.

    Raises:
        ValueError: If the resolution is not positive.
    """

    def __init__(self, names: list[str], resolution: int, center_crop: bool = False, random_flip: bool = False) -> None:
        if resolution < 1:
            raise ValueError(f"resolution={resolution}: it is the width of the images in pixels, at least 1")
        self.names = names
        self.resolution = resolution
        self.center_crop = center_crop
        self.random_flip = random_flip
        self._augment = transforms.Compose(
            [
                transforms.CenterCrop(resolution) if center_crop else transforms.RandomCrop(resolution),
                transforms.RandomHorizontalFlip() if random_flip else transforms.Lambda(_same),
            ]
        )

    def __len__(self) -> int:
        return len(self.names)

    def open(self, index: int) -> BinaryIO:
        """The file of an image, open for reading."""
        raise NotImplementedError

    def picture(self, index: int) -> Image.Image:
        """An image as it is, upright and in RGB.

        Raises:
            ValueError: If it cannot be read, with its name.
        """
        try:
            with self.open(index) as file, Image.open(file) as image:
                return _to_rgb(ImageOps.exif_transpose(image))
        except Exception as error:  # of a damaged file Pillow raises almost anything
            raise ValueError(f"cannot read the image {self.names[index]}: {error}") from error

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """An image as it is trained on: ``pixel_values``, shape ``(3, R, R)``, float32 in [-1, 1]."""
        return {"pixel_values": _to_tensor(self._augment(self._resized(index)))}

    def fixed(self, index: int, flip: bool = False) -> Tensor:
        """An image without chance, its middle cropped.

        Args:
            index (int): Which.
            flip (bool): Whether it is mirrored. Defaults to False.

        Returns:
            Tensor: Shape ``(3, R, R)``, float32 in [-1, 1].
        """
        image = F.center_crop(self._resized(index), [self.resolution])
        return _to_tensor(F.hflip(image) if flip else image)

    def _resized(self, index: int) -> Image.Image:
        # Pillow's bilinear filter is wide enough for the image it shrinks: it is what `antialias` means for tensors
        return F.resize(self.picture(index), self.resolution, F.InterpolationMode.BILINEAR)


class ImageFolder(Images):
    """All images below a folder, and below folders that are linked into it, in the order of their names.

    Args:
        root (str | Path): The folder.
        resolution, center_crop, random_flip: As for :class:`Images`.

    Attributes:
        names (list[str]): Paths relative to ``root``, with ``/``.

    Raises:
        ValueError: If the folder is missing or holds no images.

    Example:
        >>> ImageFolder("data/faces", 64, center_crop=True, random_flip=True)[0]["pixel_values"].shape
        torch.Size([3, 64, 64])
    """

    def __init__(self, root: str | Path, resolution: int, center_crop: bool = False, random_flip: bool = False) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"there is no folder {root}: name one that holds images")
        extensions = image_extensions()
        walk = os.walk(self.root, followlinks=True)
        files = (Path(folder, name) for folder, _, inside in walk for name in inside)
        images = (path for path in files if path.suffix.lower() in extensions and path.is_file())
        names = sorted(path.relative_to(self.root).as_posix() for path in images)
        if not names:
            raise ValueError(
                f"the folder {root} holds no images: files below it must end in one of {' '.join(sorted(extensions))}"
            )
        super().__init__(names, resolution, center_crop, random_flip)

    def open(self, index: int) -> BinaryIO:
        return (self.root / self.names[index]).open("rb")


class HubImages(Images):
    """The images of a data set of the ``datasets`` library.

    Args:
        name (str): Id on the hub, or a local directory.
        resolution, center_crop, random_flip: As for :class:`Images`.
        config (str, optional): Which configuration of the data set. Defaults to None: its only one.
        split (str): Which split. Defaults to ``'train'``.
        column (str, optional): Which column holds the images. Defaults to None: the only such column.
        cache_dir (str, optional): Where downloads are kept. Defaults to None: where ``datasets`` keeps them.

    Attributes:
        names (list[str]): Row numbers.

    Raises:
        ImportError: If ``datasets`` is not installed.
        ValueError: If the data set, the split or the column is not there.
    """

    def __init__(
        self,
        name: str,
        resolution: int,
        center_crop: bool = False,
        random_flip: bool = False,
        *,
        config: str | None = None,
        split: str = "train",
        column: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                "a data set of the hub needs the package datasets: pip install 'infobatch_mm[diffusers]'"
            ) from error
        try:
            table = datasets.load_dataset(name, config, split=split, cache_dir=cache_dir)
        except Exception as error:  # no such data set, split or configuration, no network, damaged files
            raise ValueError(
                f"cannot load the split {split!r} of the data set {name!r}: {error}; name a data set of the hub, which "
                "must be reachable or in the cache already, or a local directory"
            ) from error
        columns = [key for key, kind in table.features.items() if isinstance(kind, datasets.Image)]
        if column is None and len(columns) == 1:
            column = columns[0]
        if column not in columns:
            raise ValueError(
                f"the data set {name!r} has no one column of images that is meant by {column!r}: its columns are "
                f"{', '.join(table.column_names)}, those of images {', '.join(columns) or 'none'}"
            )
        if not len(table):
            raise ValueError(f"the split {split!r} of the data set {name!r} holds no images")
        super().__init__([str(row) for row in range(len(table))], resolution, center_crop, random_flip)
        self._column = column
        # bytes as they are stored: decoded here, in one way for all data sets
        self._table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def open(self, index: int) -> BinaryIO:
        stored: dict[str, Any] = self._table[index][self._column]
        return io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else Path(stored["path"]).open("rb")


def image_extensions() -> frozenset[str]:
    """Endings of the files that Pillow reads, in lower case, with their dot."""
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def _same(image: Image.Image) -> Image.Image:
    return image  # a function with a name, for workers that are not forked


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would make white of all that is above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _to_tensor(image: Image.Image) -> Tensor:
    # As torchvision's to_tensor, but float32 and on the CPU whatever a script has set as its default.
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255) * 2 - 1
