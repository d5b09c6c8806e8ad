"""What a script on accelerate is told: a line for each pass, and warnings of what seems to go wrong, each once."""

from __future__ import annotations

from typing import Any

from ..core.console import unscored_line
from ..core.notices import Notices
from ..core.training import Training


class ScriptNotices(Notices):
    """Tells a script what its passes come to."""

    def pass_done(self, training: Training, entry: dict[str, Any], nonfinite: int, wall_time_s: float) -> None:
        """A pass was booked, in which so many losses were not finite."""
        if not self._speaks:
            return
        self._say_pass(training, wall_time_s)
        if nonfinite:
            self._warn(
                "nonfinite",
                f"{nonfinite} visits of pass {training.pass_index} had a loss, or a noise level, that is not finite: "
                "they are no scores, and samples without one are never pruned (later passes say so in their line)",
            )
        if entry["skipped"]:
            self._warn(
                "skipped",
                f"{entry['skipped']} visits of pass {training.pass_index} were handed out and not weighed (later "
                "passes say so in their line): call infobatch.weigh() for every batch; after a resume skip none, the "
                "loader goes on where the checkpoint was saved",
            )
        if line := unscored_line(training):
            self._warn("unscored", line)

    def beyond_the_end(self, training: Training) -> None:
        """A walk begins after the last pass."""
        self._warn(
            "end",
            f"pass {training.pass_index + 1} of a training of {training.schedule.num_passes} epochs, which is done: "
            "give AcceleratedInfoBatch the length by which the script ends, max_train_steps= or num_epochs=, and let "
            "its loop be `for epoch in range(infobatch.passes_done, infobatch.num_passes)`",
        )

    def idle(self, start: int) -> None:
        """A walk from some position on was not weighed: a resume of old, or the filling of a cache."""
        if start:
            self._warn(
                "skips",
                "the rest of a resumed pass was walked and not weighed, and counts for nothing: delete what skips "
                "batches after a resume, the loader goes on where the checkpoint was saved",
            )
            return
        # Many scripts read their cache by the step.
        self._warn(
            "idle",
            "a whole walk of the train dataloader was not weighed, and counts for nothing. If it filled a cache of "
            "latents or prompts: passes are reshuffled, and pruned ones leave samples out, so that cache[step] belongs "
            "to other samples than the batch whose loss is weighed; keep an entry for each sample of the data set, and "
            "read cache[infobatch.index]",
        )
