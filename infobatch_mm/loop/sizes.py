"""What is known of the sizes of batches, which some users say when they make the object and others with a loader."""

from __future__ import annotations

import warnings

from torch import Tensor

from ..core.checks import whole_number
from ..core.devices import on_cpu
from ..core.distributed import world_size
from ..core.pruner import Pruner
from ..core.schedule import EpochSchedule
from .walk import Walk


class Sizes:
    """Sizes of the batches of one training.

    Args:
        pruner (Pruner): Whose schedule learns of them.
        batch_size (int, optional): Global batch size, if the user gave one.

    Attributes:
        world (int): Number of processes that share the data.
        batch_size (int, optional): Samples in a batch of this process, as far as it is known.
        full_batches (int): Batches of an unpruned pass on this process.
        resumed_batches (int, optional): The same of the run whose state was loaded.
    """

    def __init__(self, pruner: Pruner, batch_size: int | None) -> None:
        self._pruner = pruner
        self.world = world_size(pruner.group)
        self.batch_size = None if batch_size is None else batch_size // self.world
        self.full_batches = self._batches(pruner.schedule.num_samples)
        self.resumed_batches: int | None = None
        self._is_given = batch_size is not None
        self._has_loader = self._is_warned = False

    def adopt(self, batch_size: int, epoch_visits: int) -> None:
        """Take the sizes of the first of our loaders; the batches of others must fit them.

        Args:
            batch_size (int): Samples in a batch of this process.
            epoch_visits (int): Visits of all processes in an unpruned pass.

        Raises:
            ValueError: If the batches do not make up a global one.
        """
        schedule = self._pruner.schedule
        whole, at_once = schedule.batch_size, batch_size * self.world
        if not self._is_given and not self._has_loader:
            whole = checked_batch(at_once, schedule.num_samples, self.world)
        elif whole % at_once:
            raise ValueError(
                f"batch_size={batch_size} on each of {self.world} processes is {at_once} at once, which does not "
                f"divide the global batch_size={whole} of InfoBatch: give the loader "
                f"batch_size={whole // self.world}, or leave it out"
            )
        if not self._has_loader:
            self._tell(whole, epoch_visits)
            self.batch_size, self._has_loader = batch_size, True
            self.full_batches = self._batches(epoch_visits)
            self._pruner.share_batches(whole // batch_size)
        elif self._pruner.policy.keep == "steps" and batch_size != self.batch_size:
            raise ValueError(
                f"batch_size={batch_size} of another loader, the first one has {self.batch_size}: with keep='steps' "
                "the batches of all loaders become smaller together; give both the same, or use keep='batch'"
            )

    def in_pass(self, batch_size: int) -> int:
        """What is left of a batch of this process in the pass in hand, which may be one of smaller batches."""
        return batch_size * self._pruner.pass_batch // self._pruner.schedule.batch_size

    def expect(self, batch_size: int) -> None:
        """Take the global batch size of a state, where the loader that knows it may be made only later."""
        if not self._is_given and not self._has_loader and batch_size % self.world == 0:
            self._tell(batch_size, None)

    def look(self, walk: Walk, index: Tensor) -> None:
        """Say so, once, if the batches of a loader of the user's are larger than the global batch size."""
        whole = self._pruner.schedule.batch_size
        at_once = len(index) * self.world
        if self.world == 1 or walk.batch is not None or self._is_warned or not whole > self.world or at_once <= whole:
            return
        if on_cpu(index) and len(index.unique()) * self.world > whole:  # and not several views of it
            self._is_warned = True
            warnings.warn(
                f"{len(index)} samples on each of {self.world} processes are {at_once} at once, but batch_size={whole} "
                f"is the global batch size: give the DataLoader batch_size={whole // self.world}",
                stacklevel=4,
            )

    def _batches(self, visits: int) -> int:
        share = -(-visits // self.world)
        return -(-share // (self.batch_size or 1))

    def _tell(self, batch_size: int, epoch_visits: int | None) -> None:
        schedule = self._pruner.schedule
        assert isinstance(schedule, EpochSchedule)
        batches = None if epoch_visits is None else -(-epoch_visits // batch_size)
        self._pruner.reschedule(
            EpochSchedule(
                schedule.num_samples,
                schedule.num_passes,
                batch_size,
                batches,
                epoch_visits=epoch_visits,
                max_steps=schedule.max_steps,
            )
        )


def checked_batch(batch_size: int, num_samples: int, world: int) -> int:
    """A global batch size.

    Raises:
        ValueError: If it is no whole number, larger than the data set, or does not divide among the processes.
    """
    size = whole_number("batch_size", batch_size, 1, "it is the global batch size and must be at least 1")
    if size > num_samples:
        raise ValueError(
            f"one global batch holds {size} samples but the data set only {num_samples}: there is nothing to "
            "prune within a pass; use a smaller batch size"
        )
    if size % world:
        raise ValueError(f"batch_size={size} is the global batch size and must divide by {world} processes")
    return size
