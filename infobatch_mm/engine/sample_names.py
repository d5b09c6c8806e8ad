"""Names of samples, many at once, and the fingerprint that they make."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset, ClassBalancedDataset, ConcatDataset

from .repeats import is_repeat

# A fingerprint looks at no more names than these, evenly spread. A data set of the user's may open a file for each.
_FEW, _MANY = 256, 65_536


def sample_name(dataset: Any, index: int, folders: int = 0) -> str:
    """Name of one sample.

    Args:
        dataset: A data set of MMEngine's kind, or any other.
        index (int): Which sample.
        folders (int): How many folders above the file belong to the name. Defaults to 0.

    Returns:
        str: Its file name, or what stands for one; '' where the data set does not tell.
    """
    try:
        info = dataset.get_data_info(index)
        path = info["img_path"] if "img_path" in info else info["img_id"]
    except Exception:  # a name is a convenience: whatever a data set of the user's does here, go on without
        return ""
    return _shortened(path, folders)


def names_at(dataset: Any, indices: np.ndarray, folders: int = 0) -> list[str]:
    """Names of some samples; see :func:`sample_name`.

    Args:
        dataset: A data set.
        indices (np.ndarray): Which samples, shape ``(B,)``, int64, at least 0.
        folders (int): As of :func:`sample_name`. Defaults to 0.

    Returns:
        list[str]: One name each.
    """
    try:
        paths = _paths(dataset, indices)
    except Exception:  # as above
        paths = None
    if paths is None:
        return [sample_name(dataset, index, folders) for index in indices.tolist()]
    return [_shortened(path, folders) for path in paths]


def names_in_chunks(
    dataset: Any, size: int = 65_536, folders: int = 1, length: int | None = None
) -> Iterator[list[str]] | None:
    """Names of all samples in their order, a chunk at a time: 10**8 names are never held together.

    Args:
        dataset: A data set.
        size (int): Samples in a chunk, at least 1; fewer in the last one. Defaults to 65,536.
        folders (int): As of :func:`sample_name`. Defaults to 1: folders may stand for classes.
        length (int, optional): Number of samples, from the first on. Defaults to all of the data set.

    Returns:
        Iterator[list[str]] | None: The chunks; None where the data set does not name its first sample.
    """
    length = len(dataset) if length is None else length
    if length == 0 or not sample_name(dataset, 0):
        return None
    starts = range(0, length, size)
    return (names_at(dataset, np.arange(start, min(start + size, length)), folders) for start in starts)


def fingerprint(dataset: Any, length: int | None = None) -> str:
    """Short hash of sample names, by which a checkpoint knows its data set.

    Args:
        dataset: A data set.
        length (int, optional): Number of samples, from the first on. Defaults to all of the data set.

    Returns:
        str: Of all names where they are 256 or fewer, or 65,536 or fewer and can be read in bulk; else of so many,
        evenly spread. '' where the data set has no names.
    """
    length = len(dataset) if length is None else length
    if length == 0:
        return ""
    looked_at = min(length, _MANY if _is_bulk(dataset) else _FEW)
    names = names_at(dataset, np.arange(looked_at) * length // looked_at)
    return hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest() if any(names) else ""


def _shortened(path: Any, folders: int) -> str:
    return "/".join(str(path).replace("\\", "/").split("/")[-1 - folders :])


def _is_bulk(dataset: Any) -> bool:
    try:
        return _paths(dataset, np.zeros(1, dtype=np.int64)) is not None
    except Exception:  # as above
        return False


def _paths(dataset: Any, indices: np.ndarray) -> list[Any] | None:
    """What :func:`sample_name` makes names of, from where the data sets of MMEngine keep it; None for other ones."""
    if is_repeat(dataset):
        return _paths(dataset.dataset, indices % len(dataset.dataset))
    if _reads_as(dataset, ClassBalancedDataset):
        return _paths(dataset.dataset, np.array([dataset.repeat_indices[index] for index in indices.tolist()]))
    if _reads_as(dataset, ConcatDataset):
        return _paths_of_parts(dataset, indices)
    if not isinstance(dataset, BaseDataset) or type(dataset).get_data_info is not BaseDataset.get_data_info:
        return None
    dataset.full_init()
    if not dataset.serialize_data:
        infos: Iterator[Any] = (dataset.data_list[index] for index in indices.tolist())
    else:
        ends = dataset.data_address
        begins = np.where(indices > 0, ends[indices - 1], 0)
        records = memoryview(dataset.data_bytes)
        spans = zip(begins.tolist(), ends[indices].tolist(), strict=True)
        infos = (pickle.loads(records[begin:end]) for begin, end in spans)
    return [info["img_path"] if "img_path" in info else info["img_id"] for info in infos]


def _reads_as(dataset: Any, host: type) -> bool:
    """Whether a data set finds its samples in the way of one of the hosts' classes."""
    own = type(dataset)
    return isinstance(dataset, host) and all(
        getattr(own, name) is getattr(host, name) for name in ("get_data_info", "_get_ori_dataset_idx")
    )


def _paths_of_parts(dataset: Any, indices: np.ndarray) -> list[Any] | None:
    ends = np.asarray(dataset.cumulative_sizes)
    parts = np.searchsorted(ends, indices, side="right")
    paths: list[Any] = [None] * len(indices)
    for part in np.unique(parts).tolist():
        where = np.flatnonzero(parts == part)
        found = _paths(dataset.datasets[part], indices[where] - (ends[part - 1] if part else 0))
        if found is None:
            return None
        for place, path in zip(where.tolist(), found, strict=True):
            paths[place] = path
    return paths
