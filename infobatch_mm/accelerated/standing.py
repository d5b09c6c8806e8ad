"""Where an accelerate script stands: what is done, what it came to, and the state from which it goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..core import EpochSchedule
from ..core.standing import Standing
from ..core.state import PrunerState
from ..core.summary import check_summary
from .checks import check_counts
from .loader import LoaderGeometry
from .scheduler import PassScheduler
from .updates import updates_expected
from .walk import PassWalk


class ScriptStanding(Standing):
    """What :class:`.AcceleratedInfoBatch` says of itself between steps, to the script and to accelerate."""

    _schedule: EpochSchedule
    _geometry: LoaderGeometry
    _walk: PassWalk
    _schedulers: list[PassScheduler]
    _accumulated: int  # batches to an update
    _own_steps: dict[str, Any]  # settings of the schedule, which a loaded state may change

    @property
    def passes_done(self) -> int:
        """Passes that are done; where a script's loop over epochs goes on after a resume."""
        return self._pruner.pass_index + self._walk.is_pass_over

    @property
    def updates_done(self) -> int:
        """Optimiser steps made so far, with the accelerator's gradient accumulation."""
        return self._walk.updates_done

    @property
    def updates_expected(self) -> int:
        """Optimiser steps of the whole training; passes to come are estimated from the last pruned one.

        For a progress bar's remaining time. Exact from the last pruned pass on.
        """
        return updates_expected(self._walk, self._pruner, self._geometry.batch_size, self._accumulated)

    def logs(self) -> dict[str, float]:
        """Scalars of the last finished pass, for ``accelerator.log``; empty before there is one."""
        return self._pruner.scalars()

    def summary(self) -> dict[str, Any]:
        """Policy, passes, visits, saved share, iterations, time and one entry per pass, as plain numbers.

        On several processes, visits that others skipped since the last :meth:`merge` are not known.
        """
        return self._pruner.summary(
            is_over=self._walk.is_pass_over,
            iterations=self._walk.iterations,
            iterations_full=self._schedule.full_batches_before(self.num_passes),
            wall_time_s=round(self._walk.wall_time_s, 3),
        )

    def check_output(self, output_dir: str | os.PathLike[str]) -> None:
        """Refuse to resume into a directory whose summary belongs to a run of other settings.

        Raises:
            ValueError: With both values and the file.
        """
        check_summary(str(output_dir), self._pruner.summary())

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, as ``accelerator.save_state`` asks for it; plain tensors and numbers."""
        return {
            **self._pruner.state_dict(),
            "num_epochs": self._schedule.num_passes,
            "iterations": self._walk.iterations,
            "updates": self._walk.updates_done,
            "wall_time_s": self._walk.wall_time_s,
        }

    def check_state(self, state: Mapping[str, Any]) -> PrunerState:
        """Read a state, and refuse one of another run; see :meth:`load_state_dict`."""
        parsed = self._pruner.check_state(state)
        check_counts(state, self._schedule)
        return parsed

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the next unvisited position of the same plan, as ``accelerator.load_state`` asks for it.

        Raises:
            ValueError: With both values, if the state is of another data set, policy or length of training, of a
                newer version, or damaged.
        """
        self._pruner.load_state_dict(self.check_state(state))
        for each in self._schedulers:
            each.forget()
        if all(each.follows_its_arguments for each in self._schedulers):
            self._schedule.take_over(self._own_steps)
        self._walk.iterations = int(state["iterations"])
        self._walk.updates_done = int(state["updates"])
        self._walk.restart(float(state["wall_time_s"]))
