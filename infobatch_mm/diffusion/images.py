"""Images to train on: from a folder or from a data set of the hub, in the form that diffusers' examples give them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..core.distributed import gather, raise_together, rank, world_size

try:
    from PIL import Image, ImageOps
    from torchvision import transforms
    from torchvision.transforms import functional as F
except ImportError as error:
    raise ImportError(
        "infobatch_mm.diffusion.images needs torchvision and Pillow: pip install 'infobatch_mm[diffusers]'"
    ) from error

T = TypeVar("T")

#: Bytes of each of the three parts of a file that its fingerprint looks at.
_BLOCK = 4096
#: So many names are listed in an error.
_NAMED = 3


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


def check_images(images: Images) -> None:
    """Decode every image once, before training; every process must call it, and takes its share.

    Raises:
        ValueError: On every process: if images cannot be read, or if they differ in size although a random part of
            each would be cropped.
    """
    mine = range(rank(), len(images), world_size())
    sizes: dict[tuple[int, int], int] = {}  # and the first image of each
    broken: list[tuple[int, str]] = []
    for index, found in zip(mine, _in_threads(lambda index: _size(images, index), mine), strict=True):
        if isinstance(found, str):
            broken.append((index, found))
        else:
            sizes.setdefault(found, index)
    # One order on every process, whichever found what: that of the images.
    everyones = gather((sizes, broken))
    broken = sorted(entry for _, part in everyones for entry in part)
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(images)} images cannot be read: "
            + "; ".join(message for _, message in broken[:_NAMED])
            + ("; ..." if len(broken) > _NAMED else "")
            + "; remove or replace them"
        )
    if not images.center_crop:
        firsts = sorted((index, size) for part, _ in everyones for size, index in part.items())
        (one, size), *others = firsts
        for other, another in others:
            if another != size:
                raise ValueError(
                    f"the images differ in size: {images.names[one]} is {size[0]}x{size[1]}, {images.names[other]} is "
                    f"{another[0]}x{another[1]}: pass --center_crop to train on the middle of each, or bring them to "
                    "one size"
                )


def fingerprint_images(images: Images) -> str:
    """What tells one set of images from another: names, sizes in bytes, and three blocks of each file.

    Every process must call it, and reads its share.

    Returns:
        str: 32 hexadecimal digits, the same on every process.

    Raises:
        ValueError: If a file cannot be read.
    """
    mine = range(rank(), len(images), world_size())
    digests: dict[int, bytes] = {}
    error = None
    try:
        digests = dict(zip(mine, _in_threads(lambda index: _digest(images, index), mine), strict=True))
    except Exception as problem:  # whatever it is, the other processes must not be left waiting
        error = f"cannot read the images: {problem}"
    raise_together(error)
    for part in gather(digests):
        digests.update(part)
    whole = blake2b(digest_size=16)
    for index, name in enumerate(images.names):
        whole.update(name.encode(errors="surrogateescape") + b"\0" + digests[index])
    return whole.hexdigest()


def _same(image: Image.Image) -> Image.Image:
    return image  # a function with a name, for workers that are not forked


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would make white of all that is above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _to_tensor(image: Image.Image) -> Tensor:
    # As torchvision's to_tensor, but float32 and on the CPU whatever a script has set as its default.
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255) * 2 - 1


def _in_threads(function: Callable[[int], T], indices: Iterable[int]) -> Iterator[T]:
    """As ``map``, in threads: reading waits for the disk, and Pillow decodes without holding Python's lock."""
    with ThreadPoolExecutor() as pool:
        yield from pool.map(function, indices)


def _size(images: Images, index: int) -> tuple[int, int] | str:
    """Width and height of an image, or what is wrong with it."""
    try:
        return images.picture(index).size
    except ValueError as error:
        return f"{images.names[index]} ({error.__cause__})"


def _digest(images: Images, index: int) -> bytes:
    with images.open(index) as file:
        size = file.seek(0, io.SEEK_END)
        digest = blake2b(str(size).encode(), digest_size=16)
        for start in (0, (size - _BLOCK) // 2, size - _BLOCK):
            file.seek(max(0, start))
            digest.update(file.read(_BLOCK))
    return digest.digest()
