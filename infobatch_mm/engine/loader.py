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
from ..core.sampler import item_seed

#: Where data set wrappers of the hosts keep what they wrap.
_INNER = ("dataset", "_dataset", "datasets")


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

    Raises:
        ValueError: For an iterable data set, a custom batch sampler, or a loader without batches.
    """

    _batch: BatchIndices | None = None

    def __init__(self, loader: DataLoader, sampler: Any = None, own_seed: int | None = None) -> None:
        check_indexable(loader)
        host = loader.batch_sampler
        if type(host) is BatchSampler:
            batching = dict(batch_size=host.batch_size, sampler=sampler or host.sampler, drop_last=host.drop_last)
        else:
            batching = dict(batch_sampler=host)
        generator, init = loader.generator, loader.worker_init_fn
        if own_seed is not None:
            generator = torch.Generator()
            init = None if init is None else SeedByPass(init)
        super().__init__(
            IndexedDataset(loader.dataset),
            collate_fn=_BatchCollate(loader.collate_fn),
            worker_init_fn=init,
            generator=generator,
            **batching,
            **worker_options(loader),
        )
        self._own_seed = own_seed
        self._delivered: dict[int, BatchIndices] = {}

    def start_pass(self, pass_index: int) -> None:
        """Seed what the coming pass draws: workers that are made anew for it repeat no augmentation."""
        if self._own_seed is not None:
            self.generator.manual_seed(self._own_seed + pass_index)
        if isinstance(self.worker_init_fn, SeedByPass):
            self.worker_init_fn.pass_index = pass_index

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
    """

    def __init__(self, dataset: Any) -> None:
        self.__dict__["_wrapped"] = dataset
        self.__dict__["_leaves"] = [leaf for leaf in leaf_datasets(dataset) if hasattr(leaf, "_rand_another")]

    def __len__(self) -> int:
        return len(self._wrapped)

    def __getitem__(self, index: int) -> Any:
        return self._wrapped[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, bool, Any]]:
        """Items of a batch as ``(index, replaced, item)``."""
        # Which item was replaced can only be told where they are read one by one.
        at_once = None if self._leaves else read_at_once(self._wrapped, indices)
        if at_once is not None:
            return [(int(index), False, item) for index, item in zip(indices, at_once, strict=True)]
        items = []
        for index in indices:
            with _watch_replacement(self._leaves) as replaced, item_seed(index):
                item = self._wrapped[int(index)]
            items.append((int(index), bool(replaced), item))
        return items

    def __getattr__(self, name: str) -> Any:
        # Unpickling asks for attributes before there is anything to ask; protocols are this object's own.
        if name in ("_wrapped", "_leaves") or name.startswith("__"):
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
        return (torch.tensor(indices, dtype=torch.int64), torch.tensor(replaced)), batch


class SeedByPass:
    """Worker initialisation that gives workers made anew for a pass other draws than in the pass before.

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


def leaf_datasets(dataset: Any) -> Iterator[Any]:
    """The data sets at the bottom of a stack of wrappers."""
    children: list[Any] = []
    for name in _INNER:
        part = getattr(dataset, "__dict__", {}).get(name)
        children += part if isinstance(part, (list, tuple)) else [part]
    # A data set may call a plain attribute of its own "dataset".
    children = [child for child in children if hasattr(child, "__getitem__") and not isinstance(child, (str, dict))]
    if not children:
        yield dataset
    for child in children:
        yield from leaf_datasets(child)


def sample_name(dataset: Any, index: int, folders: int = 0) -> str:
    """File name of a sample and of so many folders above it; '' where the data set does not tell."""
    try:
        info = dataset.get_data_info(index)
        path = info["img_path"] if "img_path" in info else info["img_id"]
    except Exception:  # a name is a convenience: whatever a data set of the user's does here, go on without
        return ""
    return "/".join(str(path).replace("\\", "/").split("/")[-1 - folders :])


@contextmanager
def _watch_replacement(leaves: list[Any]) -> Iterator[list[Any]]:
    """Notice when MMEngine's ``BaseDataset`` answers with another sample.

    It does so when a pipeline returns None, by ``_rand_another``, without telling. The method is shadowed
    on these data sets alone and only while one item is read.
    """
    replaced: list[Any] = []
    for leaf in leaves:
        leaf._rand_another = _noting(leaf._rand_another, replaced)
    try:
        yield replaced
    finally:
        for leaf in leaves:
            del leaf._rand_another


def _noting(rand_another: Callable[[], int], replaced: list[Any]) -> Callable[[], int]:
    def noted() -> int:
        replaced.append(True)
        return rand_another()

    return noted
