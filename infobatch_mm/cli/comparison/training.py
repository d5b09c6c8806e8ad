"""One training in a process of its own, with its log and a bar of its progress."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..config import merged
from ..subcommands import command

# Lines of the training's log that are worth showing while it runs.
_SHOWN = re.compile(r"((Iter|Epoch)\((train|val)\)|InfoBatch|Saving checkpoint)")
# How far a run is: its iteration of how many, or its epoch.
_ITERATION = re.compile(r"Iter\(train\) +\[ *(\d+)/(\d+)\]")
_EPOCH = re.compile(r"Epoch\(train\) +\[ *(\d+)\]")

# Seconds between two notes of a training's time.
_TELL_EVERY = 1.0


def progress_on(console: Console) -> Progress:
    """Bars of the trainings: plain lines where the output is kept in a file, live bars on a terminal."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    return Progress(*columns, console=console)


def train(
    arm: str,
    config: Path,
    work_dir: Path,
    options: list[str],
    progress: Progress,
    *,
    resume: bool = False,
    alive: Callable[[float], None] | None = None,
    descriptors: Sequence[int] = (),
) -> float:
    """Train one arm in a process of its own, showing its log.

    Args:
        arm (str): Its name.
        config (Path): What is trained.
        work_dir (Path): Where to.
        options (list[str]): For ``--cfg-options``.
        progress (Progress): Gets a bar for it.
        resume (bool): Whether it goes on from its last checkpoint. Defaults to False.
        alive (Callable, optional): Told now and then how many seconds the process has lived.
        descriptors (Sequence[int]): Files that the process holds open. Defaults to none.

    Returns:
        float: Wall-clock of the process in seconds.

    Raises:
        SystemExit: If it failed, with the end of its log.
    """
    max_epochs = merged(config, options).train_cfg.get("max_epochs")
    arguments = [str(config), "--work-dir", str(work_dir)]
    if resume:
        arguments += ["--resume"]
    else:
        (work_dir / "last_checkpoint").unlink(missing_ok=True)  # of an earlier run
    arguments += ["--cfg-options", *options]
    task = progress.add_task(arm, total=None)
    clock = _Clock(alive)
    with subprocess.Popen(
        [*command("infobatch_mm.cli", "train"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        pass_fds=tuple(descriptors),
    ) as process:
        assert process.stdout is not None
        try:
            recent = _follow(clock.lines(process.stdout), task, max_epochs, progress)
        except BaseException:  # nobody would read the training's log any more
            process.terminate()
            raise
    if process.returncode:
        raise SystemExit(f"the {arm} run failed:\n{''.join(recent)}")
    done = progress.tasks[task].total or 1
    progress.update(task, completed=done, total=done)
    return clock.seconds


class _Clock:
    """Tells now and then how long a training has lived, as a kill asks nobody.

    Args:
        alive (Callable, optional): What to tell.
    """

    def __init__(self, alive: Callable[[float], None] | None) -> None:
        self._alive = alive
        self._start = self._told = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def lines(self, log: Iterable[str]) -> Iterator[str]:
        """The lines of a log as they come."""
        for line in log:
            if self._alive is not None and time.perf_counter() - self._told > _TELL_EVERY:
                self._told = time.perf_counter()
                self._alive(self.seconds)
            yield line


def _follow(lines: Iterable[str], task: TaskID, max_epochs: int | None, progress: Progress) -> list[str]:
    """Show a log while it is written; returns its last lines."""
    recent: list[str] = []
    for line in lines:
        recent = [*recent[-40:], line]
        if _SHOWN.search(line):
            progress.console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)
        if found := _ITERATION.search(line):
            progress.update(task, completed=int(found[1]), total=int(found[2]))
        elif found := _EPOCH.search(line):
            progress.update(task, completed=int(found[1]), total=max_epochs)
    return recent
