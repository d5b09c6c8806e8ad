"""Classification data sets that MMPretrain does not read by itself."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.registry import DATASETS

try:
    from mmpretrain.datasets import BaseDataset
except ImportError as error:
    raise ImportError(
        "infobatch_mm.datasets needs MMPretrain: pip install 'infobatch_mm[mm]', or any mmpretrain you have"
    ) from error


@DATASETS.register_module()
class NpzDataset(BaseDataset):
    """A split of images and labels from one local ``.npz`` file.

    The file holds ``{split}_x``, shape ``(N, H, W, 3)``, uint8, RGB; ``{split}_y``, shape ``(N,)``, integers;
    and possibly ``classes``, the names of the classes. Samples come with their image, as from the host's CIFAR:
    a pipeline needs no loading, and the data preprocessor ``to_rgb=False``. In a config without
    ``custom_imports``, its type is ``'infobatch_mm.datasets.NpzDataset'``.

    Args:
        ann_file (str): Path of the file, relative to ``data_root`` if that is given.
        split (str): Which split, the first part of its arrays' names. Defaults to ``'train'``.
        metainfo (dict, optional): Its ``classes`` come before the file's. Defaults to None.
        kwargs: As for mmpretrain's ``BaseDataset``: ``data_root, pipeline, indices, test_mode, ...``.

    Raises:
        ValueError: If the file is missing, or its arrays are not as above.

    Example:
        >>> NpzDataset('data/cifar10.npz', split='test')
    """

    def __init__(self, ann_file: str, split: str = "train", metainfo: dict | None = None, **kwargs: Any) -> None:
        self.split = split
        super().__init__(ann_file=ann_file, metainfo=metainfo, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Images, labels and names; the host keeps them in one buffer that worker processes share.

        Returns:
            list[dict]: ``img``, shape ``(H, W, 3)``, uint8; ``gt_label``, int; ``img_id``, the sample's name.
        """
        images, labels, classes = _read(Path(self.ann_file), self.split)
        if classes is not None:
            self._metainfo.setdefault("classes", classes)
        _check(f"{self.ann_file}, split {self.split!r}", images, labels, self.CLASSES)
        prefix = f"{Path(self.ann_file).stem}-{self.split}"
        return [
            dict(img=image, gt_label=int(label), img_id=f"{prefix}-{i:05d}")
            for i, (image, label) in enumerate(zip(images, labels, strict=True))
        ]

    def extra_repr(self) -> list[str]:
        """The file and the split, for the host's ``repr``."""
        return [f"File: \t{self.ann_file}", f"Split: \t{self.split}"]


def _read(path: Path, split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...] | None]:
    """Images, labels and class names of a split, as they are in the file."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}: name an .npz file with {split}_x and {split}_y as ann_file")
    wanted = [f"{split}_x", f"{split}_y"]
    try:
        with np.load(path) as file:
            if missing := [name for name in wanted if name not in file]:
                raise ValueError(f"there is no {' and no '.join(missing)}, but {', '.join(file.files) or 'nothing'}")
            images, labels = (file[name] for name in wanted)
            classes = tuple(str(name) for name in file["classes"]) if "classes" in file else None
    # a single array, no archive at all, a damaged one, arrays of Python objects
    except (TypeError, AttributeError, zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not an .npz file with images and labels: {error}") from error
    return images, labels, classes


def _check(source: str, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...] | None) -> None:
    """Refuse arrays that are no classification data set.

    Raises:
        ValueError: With what was found.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"{source}: images are of shape {images.shape}, {images.dtype}; they must be (N, H, W, 3), uint8, RGB"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"{source}: labels are of shape {labels.shape}, {labels.dtype}; they must be (N,), integers")
    if len(images) != len(labels):
        raise ValueError(f"{source}: there are {len(images)} images but {len(labels)} labels")
    if len(images) == 0:
        raise ValueError(f"{source}: there are no samples")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= len(classes)):
        upto = "" if classes is None else f" to {len(classes) - 1}, as there are {len(classes)} classes"
        raise ValueError(f"{source}: labels go from {low} to {high}; they must go from 0{upto}")
