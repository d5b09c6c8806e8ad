"""In which order a prepared loader is walked: as plans say, or as the user's own sampler does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import skip_first_batches
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler

from ..core import PlanSampler, Pruner
from ..core.collate import IndexedCollate
from ..core.loader import IndexedItems, worker_options
from ..core.sampler import SeededIndex, filled_up
from ..core.training import Training
from .loader import LoaderGeometry


class Order(ABC):
    """What accelerate is to prepare in place of a user's loader, and how a pass of it is walked.

    Args:
        training (Training): Whose passes.
        geometry (LoaderGeometry): How accelerate cuts an epoch into steps.
    """

    def __init__(self, training: Training, geometry: LoaderGeometry) -> None:
        self._training, self._geometry = training, geometry

    @abstractmethod
    def rebuilt(self, loader: DataLoader) -> DataLoader:
        """The user's loader with indexed batches."""

    @abstractmethod
    def rest(self, prepared: DataLoader, done: int) -> DataLoader:
        """What walks the current pass without the steps that are done."""

    @abstractmethod
    def outlasts(self, batches: int) -> bool:
        """Whether a walk has more steps than so many, and is to be broken off after them."""


class PlannedOrder(Order):
    """The order of the plans that a :class:`.Pruner` draws.

    Args:
        training (Pruner): Draws them.
        geometry (LoaderGeometry): As for :class:`Order`.

    Raises:
        ValueError: If a batch holds more than the data set.
    """

    _training: Pruner

    def __init__(self, training: Pruner, geometry: LoaderGeometry) -> None:
        super().__init__(training, geometry)
        if geometry.batch_size > training.schedule.num_samples:
            raise ValueError(
                f"one global batch holds {geometry.batch_size} samples but the data set only "
                f"{training.schedule.num_samples}: there is nothing to prune within a pass; use a smaller batch size"
            )
        training.share_batches(geometry.world)

    def rebuilt(self, loader: DataLoader) -> DataLoader:
        """The user's loader, walking plans.

        Raises:
            ValueError: If its sampler is one that chooses samples itself.
        """
        sampler = _batching(loader).sampler
        plain = type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement)
        if not plain or len(sampler) != len(loader.dataset):  # type: ignore[arg-type]
            raise ValueError(
                f"the train dataloader has a {type(sampler).__name__} of {len(sampler)} draws from "  # type: ignore[arg-type]
                f"{len(loader.dataset)} samples: pruning chooses the samples itself; use shuffle=True or False, "  # type: ignore[arg-type]
                "before accelerator.prepare"
            )
        return _indexed(loader, _EvenPlanSampler(self._training, self._geometry.multiple))

    def rest(self, prepared: DataLoader, done: int) -> DataLoader:
        if self._training.policy.keep == "steps":
            _set_batches(prepared, self._training.pass_batch // self._geometry.shares)
        return prepared  # its sampler begins where the pass stands

    def outlasts(self, batches: int) -> bool:
        return False


class OwnOrder(Order):
    """The order of the user's own sampler, which a :class:`.Watcher` follows."""

    def rebuilt(self, loader: DataLoader) -> DataLoader:
        batching = _batching(loader)
        rebuilt = _indexed(loader, batching.sampler)
        if self._training.item_seed:
            seeded = _SeededBatches(batching.sampler, batching.batch_size, batching.drop_last)
            seeded.training = self._training
            # A loader that is given a batch sampler forgets its drop_last, for which accelerate asks it.
            vars(rebuilt)["batch_sampler"] = seeded
        return rebuilt

    def rest(self, prepared: DataLoader, done: int) -> DataLoader:
        # It begins its epoch again, or where its seedable sampler was, and is skipped through.
        return skip_first_batches(prepared, done) if done else prepared

    def outlasts(self, batches: int) -> bool:
        return batches != self._geometry.epoch_batches


def _batching(loader: DataLoader) -> BatchSampler:
    """Where a loader keeps its sampler: one that was made with a ``batch_sampler`` has another at ``sampler``."""
    assert isinstance(loader.batch_sampler, BatchSampler)
    return loader.batch_sampler


def _indexed(loader: DataLoader, sampler: Sampler | Any) -> DataLoader:
    batching = _batching(loader)
    return DataLoader(
        IndexedItems(loader.dataset),
        batch_size=batching.batch_size,
        sampler=sampler,
        drop_last=batching.drop_last,
        collate_fn=IndexedCollate(loader.collate_fn),
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
        **worker_options(loader),
    )


def _set_batches(prepared: DataLoader, size: int) -> None:
    """Have the batches of a prepared loader hold so many samples, in the batch samplers that accelerate wraps too."""
    sampler: Any = prepared.batch_sampler
    while sampler is not None:
        sampler.batch_size = size
        sampler = getattr(sampler, "batch_sampler", None)


class _SeededBatches(BatchSampler):
    """Batches in the order of any sampler, whose indices carry the seeds of their items.

    A batch sampler, because accelerate may put a sampler of its own in place of a plain one.
    """

    training: Training

    def __iter__(self) -> Iterator[list[int]]:
        training, position = self.training, 0
        for batch in super().__iter__():
            seeds = ((training.seed, training.pass_index, position + i) for i in range(len(batch)))
            yield [SeededIndex(index, seed) for index, seed in zip(batch, seeds, strict=True)]
            position += len(batch)


class _EvenPlanSampler(PlanSampler):
    """Walks the whole plan, for accelerate to share out, filled up to where accelerate would fill it up.

    The samples that fill up are the first ones of the pass, as accelerate's are, also where a resumed walk begins
    in its midst. Only full passes can need any.
    """

    def __init__(self, pruner: Pruner, multiple: int) -> None:
        super().__init__(pruner)
        self._multiple = multiple

    def _share(self, indices: Tensor) -> Tensor:
        return filled_up(indices, self._fills)

    def _share_of(self, visits: int) -> int:
        return visits + -visits % self._fills

    @property
    def _fills(self) -> int:
        plan = self.pruner.plan
        return 1 if plan is not None and plan.pruned else self._multiple  # smaller batches are full as they are
