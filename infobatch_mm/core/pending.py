"""Records of batches that wait, on the device where they are, to be asked for."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

# Records are joined in blocks of this many batches: thousands of small tensors take time and memory.
_JOIN_EVERY = 256
# Visits that wait on a device at most, about 20 MB. Moving them waits for the device: once in a million visits.
_MOST = 2**20

Record = tuple[Tensor, ...]


class PendingRecords:
    """Keeps records in their order, without waiting for their device.

    A record is some tensors of one length, one entry for each visit, each on any device; all records have as many
    tensors.

    Attributes:
        is_due (bool): Whether to take them now: what is on the CPU, in blocks, and what is on a device only before it
            becomes too much.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all records."""
        self._blocks: list[Record] = []
        self._loose: list[Record] = []
        self.is_due = False

    def add(self, record: Record) -> None:
        """Keep the record of one more batch.

        Its tensors are not to be changed by whoever records them. Only norms of gradients still come in: the backward
        pass fills them in later, in place. So a record stays as it is until the next one comes.
        """
        self.make_room()
        self._loose.append(record)

    def make_room(self) -> None:
        """Join the records so far, if they are many; call it before :attr:`is_due` is looked at for one more."""
        if len(self._loose) >= _JOIN_EVERY:
            # A run on one set of devices is joined there: a move to another one might wait.
            for _, run in groupby(self._loose, _devices):
                self._blocks.append(tuple(map(torch.cat, zip(*run, strict=True))))
            self._loose = []
            waits = any(device.type != "cpu" for block in self._blocks for device in _devices(block))
            self.is_due = not waits or sum(len(block[0]) for block in self._blocks) >= _MOST

    def take(self) -> Record | None:
        """All records joined, on the CPU; None if there are none. Waits for their device."""
        records = [*self._blocks, *self._loose]
        self.clear()
        return tuple(map(_joined, zip(*records, strict=True))) if records else None


def _devices(record: Record) -> tuple[torch.device, ...]:
    return tuple(each.device for each in record)


def _joined(tensors: tuple[Tensor, ...]) -> Tensor:
    """Concatenate on the device where the tensors are, then move to the CPU in one copy."""
    if len({each.device for each in tensors}) > 1:
        return torch.cat([each.cpu() for each in tensors])
    return torch.cat(tensors).cpu()
