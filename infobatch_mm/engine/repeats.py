"""Repeated data sets: what a repeat means to a loop, and the units that are scored."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

from mmengine.dataset import RepeatDataset

#: Where data set wrappers of the hosts keep what they wrap.
_INNER = ("dataset", "_dataset", "datasets")
#: What must be MMEngine's own for a repeat to be nothing but a repeat.
_OWN = ("__getitem__", "__len__", "get_data_info", "_get_ori_dataset_idx")


class Units(NamedTuple):
    """What a run scores and prunes.

    Attributes:
        dataset: The data set whose samples these are, one score each.
        message (str): What there is to say of repeats; '' where there are none.
        distinct (int): Images of a repeat that is looked through; 0 where there is none.
    """

    dataset: Any
    message: str = ""
    distinct: int = 0


def is_repeat(dataset: Any) -> bool:
    """Whether a data set is MMEngine's ``RepeatDataset``, by whichever name, or one that is read in the same way."""
    own = type(dataset)
    return isinstance(dataset, RepeatDataset) and all(
        getattr(own, name) is getattr(RepeatDataset, name) for name in _OWN
    )


def scored_units(dataset: Any, batch_size: int, by_iteration: bool) -> Units:
    """The units of a data set in the loop that trains on it.

    A loop of iterations uses a repeat only to say "for ever", and its passes are over the distinct images. An epoch of
    a repeated data set is a choice of the user's, by which validations and checkpoints are counted: there the copies
    are units of their own, and so they are below other wrappers.

    Args:
        dataset: The host's data set.
        batch_size (int): Global batch size B, over all processes.
        by_iteration (bool): Whether the loop counts iterations.

    Returns:
        Units: With the fewest repeats of which a pass leaves out, of its last batch, at most a tenth of the samples;
        one repeat in most cases.
    """
    images = dataset
    while is_repeat(images):
        images = images.dataset
    if not by_iteration or images is dataset:
        return Units(dataset, _copies(dataset))
    distinct, length = len(images), len(dataset)
    if distinct == 0:
        return Units(images)
    times = 1
    # A loop of iterations leaves out what fills no batch: of few images, that may be most of them.
    while times * distinct < length and not _fills(times * distinct, batch_size):
        times += 1
    if times * distinct == length:
        return Units(images if times == 1 else dataset, _copies(dataset))
    looked_through = "InfoBatch: the repeats of RepeatDataset are looked through: a pass is one over"
    if times == 1:
        return Units(images, f"{looked_through} its {distinct:,} images, not over {length:,} repeated ones", distinct)
    kept = copy.copy(dataset)
    kept.dataset, kept.times, kept._ori_len, kept._fully_initialized = images, times, distinct, True
    return Units(
        kept,
        f"{looked_through} {times} copies of its {distinct:,} images, not over {length:,} repeated ones; of fewer "
        f"copies, batches of {batch_size} would leave out more than a tenth; each copy has a score of its own",
        distinct,
    )


def _fills(num_samples: int, batch_size: int) -> bool:
    """Whether full batches visit at least nine tenths of so many samples."""
    return num_samples >= batch_size and 10 * (num_samples % batch_size) <= num_samples


def _copies(dataset: Any) -> str:
    """What to say of a data set of which a part is repeated."""
    leaves = {id(leaf): leaf for leaf in leaf_datasets(dataset)}
    try:
        distinct = sum(len(leaf) for leaf in leaves.values())
    except TypeError:  # a data set without a length
        return ""
    if not any(is_repeat(part) for part in _parts(dataset)) or distinct >= len(dataset):
        return ""
    return (
        f"InfoBatch: {len(dataset):,} samples are repeats of {distinct:,} images: each copy has a score of its own and "
        "is pruned by itself (only a loop of iterations looks through repeats, and only through the outermost ones)"
    )


def leaf_datasets(dataset: Any) -> Iterator[Any]:
    """The data sets at the bottom of a stack of wrappers; one that is wrapped twice comes twice."""
    children = _children(dataset)
    if not children:
        yield dataset
    for child in children:
        yield from leaf_datasets(child)


def _parts(dataset: Any) -> Iterator[Any]:
    """A data set and all that it wraps."""
    yield dataset
    for child in _children(dataset):
        yield from _parts(child)


def _children(dataset: Any) -> list[Any]:
    children: list[Any] = []
    for name in _INNER:
        part = getattr(dataset, "__dict__", {}).get(name)
        children += part if isinstance(part, (list, tuple)) else [part]
    # A data set may call a plain attribute of its own "dataset".
    return [child for child in children if hasattr(child, "__getitem__") and not isinstance(child, (str, dict))]
