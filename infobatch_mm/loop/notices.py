"""What a loop is told: a line for each pass, and warnings of what seems to go wrong, each of them once."""

from __future__ import annotations

from typing import Any

from ..core.console import unscored_line
from ..core.notices import Notices
from ..core.training import Training
from .walk import Walk


class LoopNotices(Notices):
    """Tells a loop what its passes come to."""

    def __init__(self) -> None:
        super().__init__()
        self._idle = 0  # walks on end of which nothing was weighed
        self._again = 0  # visits of the pass before that were weighed once more

    def begin(self) -> None:
        """A walk begins."""
        self._again = 0

    def weighed(self) -> None:
        """Something was weighed."""
        self._idle = 0

    def idle(self, walk: Walk) -> None:
        """A walk ended of which nothing was weighed: a training of such would stay in one pass for ever."""
        self._idle += walk.spent and walk.batch is None
        if self._idle == 3:
            self._warn(
                "idle",
                f"three walks of pass {walk.pass_index + 1} came to their end and nothing of them was weighed, so the "
                "pass is not done: weigh every batch; where drop_last leaves out the only one, use infobatch.loader()",
            )

    def again(self, walk: Walk, visits: int) -> None:
        """Visits of a pass that is over were weighed once more: who keeps its batches never begins another."""
        self._again = visits and self._again + visits
        if self._again > len(walk) > 0:
            self._warn(
                "again",
                f"batches of pass {walk.pass_index + 1}, which is over, are weighed once more, as by itertools.cycle: "
                "walk the loader for each pass, otherwise nothing is pruned and no pass is done",
            )

    def beyond_the_end(self, training: Training) -> None:
        """A walk begins after the last pass."""
        self._warn(
            "end",
            f"pass {training.pass_index + 1} of a training of {training.schedule.num_passes}, which is done: let the "
            "loop be `for epoch in range(infobatch.passes_done, infobatch.num_passes)`, or give the training its "
            "length, num_epochs= or max_train_steps=",
        )

    def pass_done(self, training: Training, entry: dict[str, Any], has_our_loader: bool) -> None:
        """A pass was booked."""
        self._say_pass(training)
        if line := unscored_line(training):
            self._warn("unscored", line)
        if entry["skipped"]:
            again = ", or has the loader been shared out among processes once more, as by accelerator.prepare"
            self._warn(
                "skips",
                f"{entry['skipped']} visits of pass {entry['pass'] + 1} were handed out and not weighed, and are "
                "booked as skipped (visits_skipped in the summary; this is said once). Were batches left out on purpose"
                f"{'' if has_our_loader else again}?",
            )
