"""What rebuilding somebody's ``DataLoader`` over a plan takes."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

from .sampler import item_seed


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
            return int(index), self.dataset[int(index if index >= 0 else -1 - index)]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # Unpickling asks for attributes before there is anything to ask; protocols are this object's own.
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)
