"""What rebuilding somebody's ``DataLoader`` over a plan takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

from .sampler import SeededIndex, item_seed


def check_indexable(loader: DataLoader) -> None:
    """Refuse a loader whose samples have no index or that makes no batches.

    Raises:
        ValueError: For an iterable data set, or without a batch size.
    """
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"{type(loader.dataset).__name__} is an iterable data set: pruning must choose samples by index; use a "
            "map-style data set"
        )
    if loader.batch_sampler is None:
        raise ValueError("the train_dataloader has batch_size=None: batches are needed to prune; set a batch_size")


def worker_options(loader: DataLoader) -> dict[str, Any]:
    """How a loader reads, apart from what and in which order: the arguments of another that reads alike."""
    options = dict(
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        multiprocessing_context=loader.multiprocessing_context,
        persistent_workers=loader.persistent_workers,
    )
    if loader.num_workers:
        options["prefetch_factor"] = loader.prefetch_factor
    if hasattr(loader, "in_order"):  # torch 2.7 and newer
        options["in_order"] = loader.in_order
    return options


class IndexedItems(Dataset):
    """Items as ``(index, item)``; a negative index marks a padding visit and is passed on as it is.

    Attributes are the data set's own.

    Args:
        dataset: A map-style data set.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Any]:
        with item_seed(index):
            return int(index), self.dataset[_real(index)]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, Any]]:
        """Items of a batch, as torch's loaders ask for them.

        Raises:
            ValueError: If the data set answers with another number of items.
        """
        items = read_at_once(self.dataset, indices)
        if items is None:
            return [self[index] for index in indices]
        return [(int(index), item) for index, item in zip(indices, items, strict=True)]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # Unpickling asks for attributes before there is anything to ask; protocols are this object's own.
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)


def read_at_once(dataset: Any, indices: Sequence[int]) -> list | None:
    """Items of a batch in one go: of ``Subset`` and Hugging Face's data sets much faster than one by one.

    Args:
        dataset: A map-style data set.
        indices (Sequence[int]): Which ones; negative for padding visits.

    Returns:
        list | None: The items; None where each must be asked for: of a data set that does not read batches, or under
        a seed of its own.

    Raises:
        ValueError: If the data set answers with another number of items.
    """
    read = getattr(dataset, "__getitems__", None)
    if not callable(read) or any(isinstance(index, SeededIndex) for index in indices):
        return None
    items = list(read([_real(index) for index in indices]))
    if len(items) != len(indices):
        raise ValueError(
            f"{type(dataset).__name__}.__getitems__ gave {len(items)} items for {len(indices)} indices: let it return "
            "one item for each, in their order"
        )
    return items


def _real(index: int) -> int:
    return int(index if index >= 0 else -1 - index)
