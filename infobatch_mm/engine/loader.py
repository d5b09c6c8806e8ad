"""Batches that know their sample indices, without the host seeing any difference.

The data set wrapper is the outermost one, so an index is unique also under ``ConcatDataset``,
``RepeatDataset`` and ``ClassBalancedDataset``, where the inner ``sample_idx`` collides. Indices travel
beside the items, not in them: what pipelines, collate functions, hooks and models get is what the host
alone would give them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from ..core.collate import IndexedCollate
from ..core.loader import check_indexable, read_at_once, worker_options
from ..core.pass_batches import PassBatches
from ..core.sampler import item_seed
from .repeats import Units, leaf_datasets


class BatchIndices(NamedTuple):
    """Which samples a batch holds.

    Attributes:
        indices (Tensor): Sample indices, shape ``(B,)``, int64.
        replaced (Tensor): Whether the data set delivered another sample in place of the one asked for,
            because its file was broken; shape ``(B,)``, bool.
    """

    indices: Tensor
    replaced: Tensor


class IndexedLoader(DataLoader):
    """A ``DataLoader`` that keeps the indices of the batch it delivered last in :attr:`current`.

    It takes the place of another loader of the same run: same data set, batch size, workers, collate
    function.

    Args:
        loader (DataLoader): The host's loader.
        sampler (Sampler, optional): Takes the place of the host's sampler. Defaults to the host's own.
        own_seed (int, optional): Base of the loader's own generator, so that starting a pass draws
            nothing from the global one. Defaults to None: as the host does.
        units (Units, optional): What is scored, and read in place of the host's data set. Defaults to that one.
        watches (bool): Whether the host's data set is read all the same, as its own sampler says; the copies of a
            unit then have the unit's index. Defaults to False.
        own_batch (Callable[[], int | None], optional): Samples of this process in a batch of the pass that is walked or
            about to be; None where they are the host's. Asked for in each walk. Defaults to the host's in every pass.

    Attributes:
        units (Units): As above.

    Raises:
        ValueError: For an iterable data set, a custom batch sampler, or a loader without batches.
    """

    _batch: BatchIndices | None = None

    def __init__(
        self,
        loader: DataLoader,
        sampler: Any = None,
        own_seed: int | None = None,
        units: Units | None = None,
        watches: bool = False,
        own_batch: Callable[[], int | None] | None = None,
    ) -> None:
        check_indexable(loader)
        host = loader.batch_sampler
        if type(host) is BatchSampler:
            batching = dict(batch_size=host.batch_size, sampler=sampler or host.sampler, drop_last=host.drop_last)
        else:
            batching = dict(batch_sampler=host)
        generator, init = loader.generator, loader.worker_init_fn
        if own_seed is not None:
            generator = torch.Generator("cpu")
            init = None if init is None else SeedByPass(init)
        units = units or Units(loader.dataset)
        differs, options = units.dataset is not loader.dataset, worker_options(loader)
        if differs and not watches:
            # Of few images, a pass takes less time than new workers; the host's live as long as its loop.
            options["persistent_workers"] = loader.num_workers > 0
        super().__init__(
            IndexedDataset(
                loader.dataset if watches else units.dataset, len(units.dataset) if differs and watches else None
            ),
            collate_fn=_BatchCollate(loader.collate_fn),
            worker_init_fn=init,
            generator=generator,
            **batching,
            **options,
        )
        if own_batch is not None:
            # In its place afterwards: a DataLoader that is given one has no batch_size, for which hosts and hooks ask.
            self.__dict__["batch_sampler"] = PassBatches(self.batch_sampler, own_batch)
        self.units = units
        self._own_seed = own_seed
        self._delivered: dict[int, BatchIndices] = {}

    def start_pass(self, pass_index: int) -> None:
        """Seed what the coming pass draws, so that new workers do not repeat the last pass's augmentations."""
        if self._own_seed is not None:
            self.generator.manual_seed(self._own_seed + pass_index)
        if isinstance(self.worker_init_fn, SeedByPass):
            self.worker_init_fn.pass_index = pass_index

    @property
    def host_dataset(self) -> Any:
        """The data set that is read, as the host made it."""
        return self.dataset.bare

    @property
    def num_units(self) -> int:
        """Number of samples that have a score of their own."""
        return len(self.units.dataset)

    @property
    def num_repeats(self) -> int:
        """Visits of a sample in a row, of repeated augmentation."""
        return getattr(self.sampler, "repeats", 1)

    @property
    def host_collate_fn(self) -> Callable:
        """The host's collation, of items without their indices."""
        return self.collate_fn.collate_fn

    @property
    def current(self) -> BatchIndices:
        """Indices of the batch delivered last."""
        assert self._batch is not None, "no batch was delivered yet"
        return self._batch

    def __iter__(self) -> Iterator[Any]:
        # Lazy: upstream's iteration loop makes its iterator long before training starts.
        for batch_indices, batch in super().__iter__():
            self._batch = self._delivered[id(batch)] = BatchIndices(*batch_indices)
            yield batch

    def take(self, batch: Any) -> BatchIndices:
        """Indices of the batch that is about to be trained on; hooks may have walked the loader since it was delivered.

        Args:
            batch: As it was delivered; of a copy nothing is known, and the indices delivered last are taken.
        """
        # The batch is alive, so that its id is of nothing that was delivered before it.
        indices = self._delivered.get(id(batch), self.current)
        self._delivered.clear()
        return indices


class IndexedDataset:
    """The host's data set, handing out each item's index when asked for a batch.

    Attributes and single items are the wrapped data set's own.

    Args:
        dataset: A map-style data set.
        num_units (int, optional): Number of samples before it repeats itself: indices are handed out modulo this.
            Defaults to None: as they are.
    """

    def __init__(self, dataset: Any, num_units: int | None = None) -> None:
        self.__dict__["_wrapped"] = dataset
        self.__dict__["_num_units"] = num_units
        # Of data sets that are concatenated with themselves each leaf once.
        leaves = {id(leaf): leaf for leaf in leaf_datasets(dataset) if hasattr(leaf, "_rand_another")}
        self.__dict__["_leaves"] = list(leaves.values())

    def __len__(self) -> int:
        return len(self._wrapped)

    def __getitem__(self, index: int) -> Any:
        return self._wrapped[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, bool, Any]]:
        """Items of a batch as ``(index, replaced, item)``."""
        # Which item was replaced can only be told where they are read one by one.
        at_once = None if self._leaves else read_at_once(self._wrapped, indices)
        if at_once is not None:
            return [(self._unit(index), False, item) for index, item in zip(indices, at_once, strict=True)]
        items = []
        for index in indices:
            with _watch_replacement(self._leaves) as replaced, item_seed(index):
                item = self._wrapped[int(index)]
            items.append((self._unit(index), bool(replaced), item))
        return items

    @property
    def bare(self) -> Any:
        """The wrapped data set."""
        return self._wrapped

    def _unit(self, index: int) -> int:
        return int(index) if self._num_units is None else int(index) % self._num_units

    def __getattr__(self, name: str) -> Any:
        # Unpickling asks for attributes before there is anything to ask; protocols are this object's own.
        if name in ("_wrapped", "_leaves", "_num_units") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._wrapped, name, value)


class _BatchCollate(IndexedCollate):
    """Collates the bare items as the host does, and beside them their indices and whether they were replaced."""

    def __call__(  # type: ignore[override]
        self, items: Sequence[tuple[int, bool, Any]]
    ) -> tuple[tuple[Tensor, Tensor], Any]:
        indices, replaced, bare = zip(*items, strict=True)
        batch, kept = self.collate(list(bare))
        assert kept is None, "every item must be in the host's batch"
        # Whatever the default device is: an index is looked up here.
        marks = torch.tensor(replaced, dtype=torch.bool, device="cpu")
        return (torch.tensor(indices, dtype=torch.int64, device="cpu"), marks), batch


class SeedByPass:
    """Worker initialisation that gives the new workers of a pass other draws than in the pass before.

    The host seeds each worker by its number alone. In the first pass this is the host's seeding, unchanged.
    """

    def __init__(self, host_init: Callable[[int], None]) -> None:
        self.host_init = host_init
        self.pass_index = 0

    def __call__(self, worker_id: int) -> None:
        self.host_init(worker_id)
        if self.pass_index:
            entropy = [torch.initial_seed() % 2**63, self.pass_index]
            seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)


@contextmanager
def _watch_replacement(leaves: list[Any]) -> Iterator[list[Any]]:
    """Notice when MMEngine's ``BaseDataset`` answers with another sample.

    It does so when a pipeline returns None, by ``_rand_another``, without telling. The method is shadowed
    on these data sets alone and only while one item is read.
    """
    replaced: list[Any] = []
    own = [vars(leaf).get("_rand_another") for leaf in leaves]
    for leaf in leaves:
        leaf._rand_another = _noting(leaf._rand_another, replaced)
    try:
        yield replaced
    finally:
        for leaf, before in zip(leaves, own, strict=True):
            if before is None:
                del leaf._rand_another
            else:
                leaf._rand_another = before


def _noting(rand_another: Callable[[], int], replaced: list[Any]) -> Callable[[], int]:
    def noted() -> int:
        replaced.append(True)
        return rand_another()

    return noted
