"""A ``DataLoader`` whose walks are passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, default_collate

from ..core import rng
from ..core.collate import IndexedCollate
from ..core.loader import IndexedItems
from ..core.pass_batches import PassBatches
from .passes import Passes
from .sampler import WalkSampler
from .walk import Walk

#: Arguments of a ``DataLoader`` by which a user would choose the samples, and what to do.
_CHOSEN = {
    "sampler": "plans choose the samples; leave it out",
    "shuffle": "plans are shuffled already; for the order of the data set use InfoBatch(shuffle=False)",
    "batch_sampler": "plans choose what a batch holds; use batch_size and drop_last",
}


class PassLoader:
    """Batches of a data set as ``(index, batch)``; each walk is one pass. Made by :meth:`.InfoBatch.loader`.

    A walk begins when its first batch is asked for, and is over when its iterator is exhausted. While an iterator is
    in the midst of a pass, the first batch of another one, as in ``next(iter(loader))``, is only a look at what comes
    next, read in this process; asked for more, it takes the pass over.

    Not a ``DataLoader`` itself: frameworks that share one out among processes would do so a second time.

    Args:
        passes (Passes): What it walks.
        dataset: A map-style data set.
        batch_size (int): Samples in a batch of this process.
        drop_last (bool): Whether a last batch that is not full is left out.
        collate_fn (Callable, optional): Makes a batch of bare items. Defaults to torch's.
        options (dict): As for ``DataLoader``.

    Attributes:
        dataset: The data set.
        batch_size (int): Samples in a batch of this process.
        drop_last (bool): As above.
        in_order (bool): Whether workers' batches come in the order of the plan.

    Raises:
        ValueError: As :meth:`.InfoBatch.loader` describes.
    """

    def __init__(
        self,
        passes: Passes,
        dataset: Any,
        batch_size: int,
        drop_last: bool,
        collate_fn: Callable[[list], Any] | None,
        options: dict[str, Any],
    ) -> None:
        for name in options.keys() & _CHOSEN.keys():
            raise ValueError(f"infobatch.loader() takes no {name}: {_CHOSEN[name]}")
        num_samples, world = passes.pruner.schedule.num_samples, passes.world
        check_dataset(dataset, num_samples)
        self._passes = passes
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = bool(drop_last)
        self.in_order = bool(options.get("in_order", True))
        if world > 1 and not self.in_order:
            raise ValueError(
                f"in_order=False lets each of {world} processes go through the plan in an order of its own, so that no "
                "checkpoint could say where they stand: leave it out"
            )
        share = -(-num_samples // world)
        self._full_length = self._batches(share, batch_size)
        if self._full_length == 0:
            raise ValueError(
                f"the loader gives no batch: {share} samples for each process, batch_size={batch_size} and "
                "drop_last=True; use a smaller batch size"
            )
        whole = self._full_length * batch_size * world
        passes.sizes.adopt(batch_size, min(num_samples, whole))
        # What a collate function drops can only be made out where the batch is known to be the next of the plan.
        self._collate = collate_fn or default_collate
        collate = IndexedCollate(collate_fn or default_collate, drops=self.in_order)
        self._items = IndexedItems(dataset)
        self._walk: Walk | None = None
        sampler = WalkSampler(self._walk_in_hand, passes.share, passes.seeds)
        batches = PassBatches(BatchSampler(sampler, batch_size, self.drop_last), lambda: self._walk_in_hand().batch)
        self._loader = DataLoader(self._items, batch_sampler=batches, collate_fn=collate, **options)

    def __len__(self) -> int:
        """Batches of the walk in hand, or of the coming one; after a resume, of the rest of the pass.

        Before the first walk of a new training, of an unpruned pass, by which schedules are sized.
        """
        passes = self._passes
        if passes.is_new:
            return self._full_length
        walk = passes.walk
        if walk is not None and walk.alive:
            return self._batches(walk.end - walk.start, walk.batch or self.batch_size)
        rest = passes.share() - passes.pruner.visited // passes.world
        return self._batches(rest, passes.sizes.in_pass(self.batch_size))

    def read(self, batches: list[list[int]]) -> Iterator[Any]:
        """Batches of some lists of sample indices, read in this process; no part of a pass."""
        for batch in batches:
            yield self._collate([self.dataset[index] for index in batch])

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the pass is known. Present because scripts call it."""

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        passes = self._passes
        if passes.is_amid:
            assert passes.walk is not None
            yield self._loader.collate_fn(self._items.__getitems__(passes.walk.next_batch()))
        walk = passes.begin(self.batch_size, self.drop_last, self.in_order)
        self._walk, walk.alive = walk, True
        # A DataLoader draws the seed of its workers from the global generator: once a pass, not again on a resume.
        generator = self._loader.generator
        if walk.start and generator is None:
            self._loader.generator = rng.generator(passes.pruner.seed, walk.pass_index, walk.start)
        try:
            batches = iter(self._loader)
        finally:
            self._loader.generator = generator
        try:
            for index, batch in batches:
                walk.hand_out(index)
                yield index, batch
                if walk.stale and walk.is_handed_out:
                    return  # another walk has begun the next pass already
                walk.require_current()
            passes.end(walk)
        finally:
            walk.alive = False

    def _walk_in_hand(self) -> Walk:
        assert self._walk is not None
        return self._walk

    def _batches(self, visits: int, batch: int) -> int:
        return visits // batch if self.drop_last else -(-visits // batch)


def check_dataset(dataset: Any, num_samples: int) -> None:
    """Refuse a data set whose samples cannot be chosen by index, or of another length.

    Raises:
        ValueError: With its type, or with both lengths.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"{type(dataset).__name__} is an iterable data set: pruning must choose samples by index; use a "
            "map-style data set with __len__ and __getitem__"
        )
    if len(dataset) != num_samples:
        raise ValueError(f"this InfoBatch was made for {num_samples} samples, the data set has {len(dataset)}")
