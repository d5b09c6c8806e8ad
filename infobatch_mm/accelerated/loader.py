"""How accelerate cuts a user's ``DataLoader`` into steps, and what the script walks in its place."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from ..core.loader import check_indexable


class LoaderGeometry:
    """How accelerate will cut a loader's epoch into the steps of all processes.

    Args:
        accelerator (Accelerator): Its ``split_batches``, ``dispatch_batches``, ``even_batches``.
        loader (DataLoader): The user's loader, before it is prepared.

    Attributes:
        batch_size (int): Global batch size, over all processes.
        shares (int): Parts of it that the loader gives, 1 where accelerate splits batches, else one for each process.
        world (int): Number of processes.
        epoch_batches (int): Steps of an epoch, on the process that makes the most of them.
        ragged (bool): Whether the last step of a full epoch finds no samples, or fewer, on some processes.
        shuffle (bool): Whether epochs are in random order.
        multiple (int): What accelerate fills a full epoch up to a multiple of.

    Raises:
        ValueError: For a loader whose samples cannot be chosen by index.
    """

    def __init__(self, accelerator: Accelerator, loader: DataLoader) -> None:
        check_indexable(loader)
        batching = loader.batch_sampler
        if type(batching) is not BatchSampler:
            raise ValueError(
                f"the train dataloader has a {type(batching).__name__} of its own: pruning must choose the samples of "
                "a batch; give the DataLoader a batch_size and shuffle=True, before accelerator.prepare"
            )
        num_samples, world = len(loader.dataset), accelerator.num_processes
        if num_samples == 0:
            raise ValueError("the data set is empty: 0 samples, at least 1 is needed")
        if accelerator.split_batches and batching.batch_size % world:
            raise ValueError(
                f"split_batches=True shares a batch of {batching.batch_size} among {world} processes: use a "
                "batch_size that divides by their number"
            )
        self.world, self.shares = world, 1 if accelerator.split_batches else world
        self.batch_size = batching.batch_size * self.shares
        self.drop_last = batching.drop_last
        self.shuffle = not isinstance(batching.sampler, SequentialSampler)
        batches = num_samples / self.batch_size
        self.epoch_batches = int(batches) if self.drop_last else math.ceil(batches)
        if self.epoch_batches == 0:
            raise ValueError(
                f"one global batch holds {self.batch_size} samples but the data set only {num_samples}, and "
                "drop_last=True leaves nothing: use a smaller batch size"
            )
        has_tail = world > 1 and not self.drop_last and bool(num_samples % self.batch_size)
        dispatched = bool(accelerator.dispatch_batches)
        self.ragged = has_tail and not dispatched and not accelerator.even_batches
        # The processes' batches, or just something for each of them.
        self.multiple = 1 if self.ragged or not has_tail else world if dispatched else self.batch_size


class PrunedLoader:
    """The prepared train dataloader: each walk is one pass, or the rest of it, of the user's own batches.

    Args:
        walk (Callable[[], Iterator]): Walks a pass.
        length (Callable[[], int]): Steps of the pass in hand; of an unpruned epoch before the first walk.
        dataloader (DataLoader): The user's.
        total_batch_size (int): Samples in a batch of all processes.

    Attributes:
        dataset: The user's data set.
        total_batch_size (int): As above.
    """

    def __init__(
        self,
        walk: Callable[[], Iterator[Any]],
        length: Callable[[], int],
        dataloader: DataLoader,
        total_batch_size: int,
    ) -> None:
        self._walk = walk
        self._length = length
        self.dataset = dataloader.dataset
        self.batch_size = dataloader.batch_size
        self.num_workers = dataloader.num_workers
        self.total_batch_size = total_batch_size

    def __iter__(self) -> Iterator[Any]:
        return self._walk()

    def __len__(self) -> int:
        return self._length()

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the pass is known. Present because scripts call it."""

    @property
    def sampler(self) -> Any:
        """Asked for by ``accelerator.skip_first_batches``, which has nothing to do here."""
        raise AttributeError(
            "the loader of infobatch.prepare() goes on by itself where a resumed run was: leave out skip_first_batches"
        )


@contextlib.contextmanager
def draws_nothing(loader: DataLoader) -> Iterator[None]:
    """Have a loader seed its workers from a generator of its own, so that resuming leaves the global one in place."""
    base = getattr(loader, "base_dataloader", loader)
    own, base.generator = base.generator, torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    try:
        yield
    finally:
        base.generator = own
