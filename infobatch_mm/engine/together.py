"""Refusals that one process may meet alone: all of them must stop, or the others would wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..core.distributed import gather


@contextmanager
def refused_together() -> Iterator[None]:
    """Look at what may differ between processes, and stop all of them where one stops; every process must enter it.

    Nothing within may exchange anything between processes.

    Raises:
        Exception: Whatever was raised within, on the process that raised it.
        ValueError: On the others, with its message.
    """
    error = None
    try:
        yield
    except Exception as found:
        error = found
    everyones = gather(None if error is None else _text(error))
    if error is not None:
        raise error
    for rank, text in enumerate(everyones):
        if text is not None:
            raise ValueError(f"{text} (found by rank {rank})")


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else repr(error)
