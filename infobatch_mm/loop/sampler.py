"""Samplers that hand the visits of a walk to a ``DataLoader``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.utils.data import Sampler

from ..core.sampler import SeededIndex
from .walk import Walk


class WalkSampler(Sampler[int]):
    """Hands out this process's share of a walk.

    Args:
        begin (Callable[[], Walk]): Called at each ``iter``, gives the walk.
        length (Callable[[], int]): Visits of this process in the whole pass that is being walked or about to be.
        seeds (Callable[[Walk], tuple[int, int] | None]): Seed of the run and number of the pass, if every index is to
            carry the seed of its item.
    """

    def __init__(
        self,
        begin: Callable[[], Walk],
        length: Callable[[], int],
        seeds: Callable[[Walk], tuple[int, int] | None],
    ) -> None:
        self._begin, self._length, self._seeds = begin, length, seeds

    def __iter__(self) -> Iterator[int]:
        # Not a generator: a pass begins here, and not where its first index is asked for.
        walk = self._begin()
        return self._hand_out(walk, self._seeds(walk))

    @staticmethod
    def _hand_out(walk: Walk, seeds: tuple[int, int] | None) -> Iterator[int]:
        for block, position in walk.visits():
            for index in block.tolist():
                walk.require_current()  # otherwise the weights of another walk would be given to these visits
                yield index if seeds is None else SeededIndex(index, (*seeds, position))
                position += walk.world

    def __len__(self) -> int:
        """Visits of this process in the whole pass.

        On several processes a pass ends with the next ``iter``: until then its length is the one of the pass before.
        """
        return self._length()

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the pass is known. Present because scripts call it."""
