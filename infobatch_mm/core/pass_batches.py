"""Batches as large as the pass in hand has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.utils.data import BatchSampler


class PassBatches(BatchSampler):
    """A batch sampler that looks up how large its batches are when each walk begins.

    Its ``batch_size`` stays the one of full passes, by which hosts size schedules.

    Args:
        batches (BatchSampler): Of full passes; its sampler, batch size and ``drop_last`` are taken.
        of_pass (Callable[[], int | None]): Samples of this process in a batch of the pass that is walked or about to
            be; None where they are the ones of full passes.
    """

    def __init__(self, batches: BatchSampler, of_pass: Callable[[], int | None]) -> None:
        super().__init__(batches.sampler, batches.batch_size, batches.drop_last)
        self._of_pass = of_pass

    def __iter__(self) -> Iterator[list[int]]:
        yield from self._in_pass()  # not before the first batch is asked for: a pass begins there

    def __len__(self) -> int:
        return len(self._in_pass())

    def _in_pass(self) -> BatchSampler:
        return BatchSampler(self.sampler, self._of_pass() or self.batch_size, self.drop_last)
