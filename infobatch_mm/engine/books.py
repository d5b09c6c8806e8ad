"""What a run says and leaves behind: lines in the log, scalars, summary and scores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from mmengine.dist import master_only

from ..core import Pruner, Training, console
from ..core.score_file import write_scores
from ..core.short_runs import short_run_line
from ..core.summary import write_summary
from ..policies import NoPruning, RandomPolicy
from .loader import IndexedLoader
from .sample_names import names_in_chunks

# Passes that are logged, evenly spread: of twenty images, a long training makes thousands.
_MOST_LINES = 200


class Books:
    """Tells a run's log and visualizer, and keeps its time.

    Attributes:
        time_before (float): Seconds of wall time before this life of the run.
    """

    def __init__(self) -> None:
        self.time_before = 0.0
        self._started = time.perf_counter()
        self._has_said_nothing_pruned = self._has_said_unscored = False
        self._remarks = console.Remarks()

    def start_clock(self) -> None:
        """Begin to count the time of this life of the run."""
        self._started = time.perf_counter()

    @property
    def wall_time(self) -> float:
        """Seconds of wall time, the lives before this one included."""
        return self.time_before + time.perf_counter() - self._started

    def begin(self, runner: Any, training: Training, loader: IndexedLoader) -> None:
        """Say what a run is about to do, before it trains."""
        log, schedule = runner.logger, training.schedule
        settings = ", ".join(f"{key} {value}" for key, value in training.policy.settings().items())
        log.info(f"InfoBatch: {settings}, {schedule.num_samples} samples")
        if loader.units.message:
            log.info(loader.units.message)
        if schedule.num_passes > _MOST_LINES:
            log.info(f"InfoBatch: one in {self._every(training)} of {schedule.num_passes:,} passes is logged")
        if line := short_run_line(training):
            log.warning(line)

    def begin_pass(self, runner: Any, pruner: Pruner) -> None:
        """Say where a pass goes on that was interrupted, and, once, that nothing could be pruned."""
        plan = pruner.plan
        assert plan is not None
        if pruner.visited:
            runner.logger.info(
                f"InfoBatch: goes on in pass {pruner.pass_index + 1} of {pruner.schedule.num_passes}, after "
                f"{pruner.visited} of its {len(plan)} visits"
            )
        if self._has_said_nothing_pruned or plan.pruned or not pruner.is_active or not pruner.store.seen.any():
            return
        if pruner.policy.remark(pruner.limit) is not None:  # it has said why
            return
        self._has_said_nothing_pruned = True
        runner.logger.warning(
            f"InfoBatch: nothing could be pruned in pass {pruner.pass_index + 1}, so it visits every sample: all "
            "scores are alike, or fewer samples lie below the mean than one global batch holds"
        )

    def end_pass(self, runner: Any, training: Training, step: int) -> None:
        """Log a finished pass.

        Args:
            runner (Runner): The run.
            training (Training): Has booked the pass.
            step (int): The iteration at which its scalars are logged.
        """
        runner.visualizer.add_scalars(training.scalars(), step=step)
        if not self._has_said_unscored and not isinstance(
            training.policy, (NoPruning, RandomPolicy)
        ):  # which need none
            unscored = console.unscored_line(training)
            if unscored:
                self._has_said_unscored = True
                runner.logger.warning(unscored)
        if remark := self._remarks.line(training):
            runner.logger.info(remark)
        done = training.pass_index
        if done == 1 or training.finished or done % self._every(training) == 0:
            runner.logger.info(console.pass_line(training))

    @staticmethod
    def _every(training: Training) -> int:
        return math.ceil(training.schedule.num_passes / _MOST_LINES)

    @master_only
    def write_summary(self, runner: Any, training: Training) -> None:
        """Write ``infobatch_summary.json``."""
        summary = training.summary(
            iterations=getattr(runner.train_loop, "_iter", 0),
            iterations_full=training.schedule.total_steps,
            wall_time_s=round(self.wall_time, 3),
        )
        _warn_on_failure(runner, lambda: write_summary(runner.work_dir, summary))

    @master_only
    def end(self, runner: Any, training: Training) -> None:
        """Write summary and scores, and say what was saved."""
        self.write_summary(runner, training)
        loader = runner.train_dataloader
        names = names_in_chunks(loader.host_dataset, length=training.store.num_samples)
        _warn_on_failure(runner, lambda: write_scores(runner.work_dir, training.store, names))
        runner.logger.info(console.end_line(training, self.wall_time))


def _warn_on_failure(runner: Any, write: Callable[[], object]) -> None:
    """A full disk must not end a training."""
    try:
        write()
    except OSError as error:
        runner.logger.warning(f"InfoBatch: could not write to {runner.work_dir}: {error}")
