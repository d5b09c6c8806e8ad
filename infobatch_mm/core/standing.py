"""What every object that stands for a training says of it between steps."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from .distributed import rank
from .summary import write_run
from .training import Training


class Standing(ABC):
    """Length, books and files of a training."""

    _pruner: Training

    @property
    def num_passes(self) -> int:
        """Passes of the whole training, where a script's loop ends; the last one may be partial."""
        return self._pruner.schedule.num_passes

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Policy, passes, visits, saved share and one entry per finished pass, as plain numbers."""

    def write(
        self, output_dir: str | os.PathLike[str], names: Sequence[str] | Iterable[Sequence[str]] | None = None
    ) -> None:
        """Write ``infobatch_summary.json`` and the scores (:func:`.write_scores`), on the first process.

        Args:
            output_dir (str | PathLike): Where to; made if it is not there.
            names (Sequence[str] | Iterable[Sequence[str]], optional): Names of the samples, or chunks of them.
        """
        summary = self.summary()
        if rank(self._pruner.group) == 0:
            write_run(output_dir, summary, self._pruner.store, names)
