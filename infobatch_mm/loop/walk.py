"""One walk over a plan: what this process was handed out of it, and what it weighed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..core.devices import on_cpu
from ..core.pending import PendingRecords
from ..core.plan import Plan
from ..core.weights import PlanWeights
from .looks import Looks

#: What becomes of a sample in a walk, in this order.
_LEFT_OUT, _PLANNED, _HANDED_OUT, _WEIGHED = range(4)
# Indices become Python integers in blocks: a pass over 10**8 samples never holds them all.
_BLOCK = 1 << 16


class Walk:
    """The visits of one plan on this process, from some position on.

    Positions count the visits of this process, every ``world``-th of the plan. Where that does not divide, some
    processes repeat its first visit at their end, under a negative index.

    Args:
        plan (Plan): What to visit.
        num_samples (int): Size N of the data set.
        pass_index (int): The pass that the plan is of.
        rank (int): This process.
        world (int): Number of processes.
        start (int): Visits of the plan that are done already, over all processes.
        batch (int, optional): Visits of this process in a batch, where a loader of ours hands them out. Defaults to
            None: the user's loader does, and only what is weighed is known.
        drop_last (bool): Whether that loader leaves out a last batch that is not full. Defaults to False.
        in_order (bool): Whether it delivers in the order of the plan. Defaults to True.

    Attributes:
        world (int): As above.
        touched, alive (bool): Whether anything was weighed; whether an iterator is in the midst of it.
        spent (bool): Whether the sampler has handed out all of it to the user's loader.
        stale, finished (bool): Whether another walk has taken its place; whether its pass is booked.
        weighed (int): Visits that were weighed, of those that were taken down so far.
        pending (PendingRecords): What was weighed and is not taken down yet; see :meth:`add`.
    """

    def __init__(
        self,
        plan: Plan,
        num_samples: int,
        pass_index: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        batch: int | None = None,
        drop_last: bool = False,
        in_order: bool = True,
    ) -> None:
        self.plan, self.pass_index = plan, pass_index
        self._num_samples, self._rank, self.world = num_samples, rank, world
        missing = -len(plan) % world
        indices = torch.cat([plan.indices, -1 - plan.indices[:1].repeat(missing)]) if missing else plan.indices
        self._own = indices[rank::world]
        self._padding = missing
        self._num_real = len(self._own) - (missing > 0 and rank >= world - missing)
        self._filled = False
        self.start = min(start // world, len(self._own))
        self.batch = batch
        left = len(self._own) - self.start
        self.end = len(self._own) - (left % batch if batch and drop_last else 0)
        self._status: np.ndarray = np.zeros(num_samples, dtype=np.uint8)
        self._status[plan.indices.numpy()] = _PLANNED
        self._handed_out = 0
        self._delivered: list[Tensor] | None = None if in_order else []
        self._weights = PlanWeights(plan, num_samples)
        self.pending = PendingRecords()
        self._calls = 0
        self.touched = self.alive = self.spent = self.stale = self.finished = False
        self.weighed = 0

    def __len__(self) -> int:
        """Visits of this process in the whole plan."""
        return len(self._own)

    # ---- handing out --------------------------------------------------------------------------------

    def visits(self) -> Iterator[tuple[Tensor, int]]:
        """What is left of this process's share: blocks of sample indices, and the position in the plan of the first."""
        position = self.start
        for block in self._own[self.start :].split(_BLOCK):
            yield block, position * self.world + self._rank
            position += len(block)
        self.spent = True

    def require_current(self) -> None:
        """Refuse to go on where another walk has taken the place of this one."""
        if self.stale:
            raise ValueError(
                f"pass {self.pass_index + 1} is walked by two iterators at once: another one took it over, or a state "
                "was loaded, in the midst of this one; let one walk end before the next begins, and read what you only "
                "look at from a DataLoader of its own"
            )

    def hand_out(self, index: Tensor) -> None:
        """Take down that a batch was delivered; its indices, shape ``(B,)``, int64, on the CPU."""
        if self._delivered is None:  # the next of the plan, also where a collate function dropped some of it
            first = self.start + self._handed_out
            planned = self._own[first : first + (self.batch or len(index))]
        else:
            planned = index
            self._delivered.append(index)
        self._handed_out += len(planned)
        where = _real(planned).numpy()
        self._status[where] = np.maximum(self._status[where], _HANDED_OUT)

    def next_batch(self) -> list[int]:
        """Indices of the batch that will be delivered next, only to look at."""
        rest = self._own[self.start + self._handed_out : self.end]
        if self._delivered is not None:
            rest = self._own[self._status[_real(self._own).numpy()] == _PLANNED]
        planned = rest[: self.batch]
        where = _real(planned).numpy()
        self._status[where] = np.maximum(self._status[where], _HANDED_OUT)
        return planned.tolist()

    # ---- weighing -------------------------------------------------------------------------------------

    def weights(self, index: Tensor) -> Tensor:
        """Weights of a batch of this walk, without waiting for a device.

        Args:
            index (Tensor): Shape ``(B,)``, int64, on any device; negative where a visit only fills up.

        Returns:
            Tensor: Shape ``(B,)``, float32, on the same device; 0 where a visit only fills up.

        Raises:
            ValueError: For indices on the CPU, if one is not of this walk; see :meth:`check` for the others.
        """
        real = _real(index) if self._padding else index
        if on_cpu(index):
            self.check(real.numpy())
        weights = self._weights(real)
        return torch.where(index < 0, 0.0, weights) if self._padding else weights

    def check(self, index: np.ndarray) -> None:
        """Refuse sample indices that this walk has not handed out.

        Raises:
            ValueError: With the first of them.
        """
        outside = (index < 0) | (index >= self._num_samples)
        if outside.any():
            raise ValueError(f"sample index {index[outside][0]} is outside the data set of {self._num_samples} samples")
        status = self._status[index]
        if (status == _LEFT_OUT).any():
            raise ValueError(
                f"sample index {index[status == _LEFT_OUT][0]} is not part of pass {self.pass_index + 1}: weigh each "
                "batch during the pass whose loader handed it out"
            )
        if self.batch is not None and (status == _PLANNED).any():
            raise ValueError(
                f"sample index {index[status == _PLANNED][0]} was not handed out so far in pass {self.pass_index + 1}: "
                "weigh each batch, with the index that came with it, during the pass whose loader handed it out"
            )

    def holds(self, index: Tensor) -> bool:
        """Whether indices on the CPU are all of this walk."""
        where = _real(index).numpy()
        least = _PLANNED if self.batch is None else _HANDED_OUT
        return bool((where < self._num_samples).all()) and bool((self._status[where] >= least).all())

    def tail_scale(self, index: Tensor) -> Tensor | float:
        """Factor by which the mean over processes becomes the mean over the real visits of a batch.

        Only the batch with the last visit of each process can be filled up. Found on the device, without a look.
        """
        if not self._padding:
            return 1.0
        slots = len(index) * self.world
        looks = (index == self._own[-1]).sum()  # more than one where a batch is seen several times
        return slots / (slots - self._padding * looks).to(torch.float32)

    def add(self, index: Tensor, losses: Tensor, level: Tensor | None) -> None:
        """Keep the losses of one call where they are: no step waits for its device."""
        self.touched = True
        call = torch.full_like(index, self._calls)
        self._calls += 1
        self.pending.add((index, losses, call) if level is None else (index, losses, call, level))

    def take_looks(self) -> tuple[Looks, bool] | None:
        """What was weighed since the last time, on the CPU, and whether a visit that only fills up is among it.

        Raises:
            ValueError: If an index is not of this walk.
        """
        records = self.pending.take()
        if records is None:
            return None
        index, losses, call, *level = records
        looks = Looks(index.numpy(), losses, level[0] if level else None, call.numpy())
        fills = looks.index < 0
        filled = bool(self._padding and fills.any())
        if filled:
            looks = looks.at(~fills)
        self.check(looks.index)
        return looks, filled

    def take_down(self, index: np.ndarray, filled: bool = False) -> np.ndarray:
        """Mark visits as weighed.

        Args:
            index (ndarray): Different sample indices of this walk, shape ``(B,)``, int64.
            filled (bool): Whether the visit that only fills up was weighed with them. Defaults to False.

        Returns:
            ndarray: Which of them were not weighed before, shape ``(B,)``, bool.
        """
        fresh = self._status[index] != _WEIGHED
        self._status[index] = _WEIGHED
        self._filled = self._filled or filled
        self.weighed += int(fresh.sum())
        return fresh

    # ---- where it stands --------------------------------------------------------------------------------

    @property
    def done(self) -> int:
        """Behind the last visit weighed, or its batch: what is in hand or read ahead comes again after a resume."""
        if not self.touched or self._filled:
            return len(self._own) if self._filled else self.start
        if self._delivered is not None:
            return self.start + len(self._done_in_any_order(self._delivered))
        where = self._status[self._own[self.start : max(self.start, self._num_real)].numpy()]
        places = np.flatnonzero(where == _WEIGHED)
        done = int(places[-1]) + 1 if len(places) else 0
        if self.batch is not None:
            done = -(-done // self.batch) * self.batch
        return min(self.start + done, len(self._own))

    @property
    def is_handed_out(self) -> bool:
        """Whether a loader of ours has delivered all of it."""
        return self.batch is not None and self.start + self._handed_out >= self.end

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is left to be weighed."""
        return self.done >= self.end and (self.touched or self.start >= self.end > 0)

    @property
    def has_nothing_to_weigh(self) -> bool:
        """Whether the rest of a resumed pass gave no batch: its loader drops a tail that is not full.

        Of a user's loader it is known that it took all of the rest.
        """
        return self.start > 0 and (self.spent if self.batch is None else self.start >= self.end)

    @property
    def outstanding(self) -> bool:
        """Whether a loader of ours has delivered what was not weighed so far."""
        return self.batch is not None and self.handed_out() > self.weighed

    def handed_out(self, up_to: int | None = None) -> int:
        """Real visits that this process was handed out since the start.

        Args:
            up_to (int, optional): Up to a position. Defaults to all of it.
        """
        if up_to is None:
            up_to = self.done if self.batch is None else self.start + self._handed_out
        return max(0, min(up_to, self._num_real) - self.start)

    def rearranged(self) -> Plan:
        """The plan with what is done before the rest, where batches were not delivered in its order."""
        if self._delivered is None:
            return self.plan
        done = torch.cat([self.plan.indices[: self.start], self._done_in_any_order(self._delivered)])
        is_done = torch.zeros(self._num_samples, dtype=torch.bool, device="cpu")
        is_done[done] = True
        indices = torch.cat([done, self.plan.indices[~is_done[self.plan.indices]]])
        return replace(self.plan, indices=indices, weights=self._weights(indices))

    def _done_in_any_order(self, delivered: list[Tensor]) -> Tensor:
        """Samples of the batches up to the last one weighed, and what else was weighed after a look."""
        kept = [i for i, batch in enumerate(delivered) if (self._status[batch.numpy()] == _WEIGHED).any()]
        done = torch.cat([self._own[:0], *delivered[: kept[-1] + 1 if kept else 0]])
        looked_at = self._status == _WEIGHED
        looked_at[done.numpy()] = False
        return torch.cat([done, torch.from_numpy(np.flatnonzero(looked_at))])


def _real(index: Tensor) -> Tensor:
    """Sample indices; a visit that only fills up is of the sample that it repeats."""
    return torch.where(index < 0, -1 - index, index)
