"""What a loss remembers from call to call, kept out of the evaluations that the host does not make."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class Memory:
    """Buffers of a module and its parts that evaluations of its loss change: moving averages, counters.

    Args:
        module (nn.Module): The loss or head.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places = [
            (part, name) for part in module.modules() for name, buffer in part._buffers.items() if buffer is not None
        ]
        self._changing: set[int] = set()
        self._settled = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Evaluate on copies of the buffers; the originals are back, and as they were, afterwards."""
        originals = [part._buffers[name] for part, name in self._places]
        copies = [None if buffer is None else buffer.clone() for buffer in originals]
        for (part, name), copy in zip(self._places, copies, strict=True):
            part._buffers[name] = copy
        try:
            yield
        finally:
            for i, ((part, name), original, copy) in enumerate(zip(self._places, originals, copies, strict=True)):
                if part._buffers[name] is not copy or (copy is not None and copy._version > 0):
                    self._changing.add(i)
                part._buffers[name] = original

    def settle(self) -> None:
        """From now on, copy only the buffers that have changed so far: most heads have none."""
        if not self._settled:
            self._settled = True
            self._places = [place for i, place in enumerate(self._places) if i in self._changing]
            self._changing = set()
