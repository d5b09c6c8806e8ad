"""What a script is told that ends before the training that it announced."""

from __future__ import annotations

import atexit
import logging
import sys

from .console import say

#: Passes done and in all of the training that has finished a pass last, where some are left.
_left: tuple[int, int] | None = None


def note(done: int, total: int) -> None:
    """Take down that a pass is finished.

    Neither the end of a loop nor a ``break`` can be told from an early end of the training: only the end of the
    process can.

    Args:
        done (int): Passes that are done.
        total (int): Passes of the whole training.
    """
    global _left
    _left = (done, total) if done < total else None


@atexit.register
def _tell() -> None:
    # Where an exception has ended the script, that is what there is to say.
    if _left is None or getattr(sys, "last_type", None) is not None:
        return
    done, total = _left
    say(
        f"InfoBatch: the script ended after {done} of {total} passes, by which it was to prune and to anneal: if that "
        f"was its end, give num_epochs={done}, or max_train_steps as the script counts it",
        logging.WARNING,
    )
