"""What a script is told between steps: a line for each pass, and warnings, each of them once."""

from __future__ import annotations

import warnings

from .console import Remarks, end_line, pass_line, say
from .ending import note
from .training import Training


class Notices:
    """Tells a script what its passes come to; hosts add what can go wrong in them.

    Args:
        speaks (bool): Whether this process warns at all. Defaults to True.
    """

    def __init__(self, speaks: bool = True) -> None:
        self._speaks = speaks
        self._told: set[str] = set()
        self._remarks = Remarks()

    def _say_pass(self, training: Training, wall_time_s: float | None = None) -> None:
        """Say what the pass that was booked last came to, and what the whole training did at its end."""
        say(pass_line(training))
        if remark := self._remarks.line(training):
            say(remark)
        note(training.pass_index, training.schedule.num_passes)
        if training.pass_index == training.schedule.num_passes:
            say(end_line(training, wall_time_s))

    def _warn(self, name: str, line: str) -> None:
        """Warn of something, unless it was said before under this name."""
        if self._speaks and name not in self._told:
            self._told.add(name)
            warnings.warn(line, stacklevel=5)
