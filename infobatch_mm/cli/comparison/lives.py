"""An arm is trained once, in as many lives as it takes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ...report.logs import set_aside
from ..config import merged
from .record import Record, alone_in, record_of
from .settings import as_plain
from .training import train


def settings_of(config: Path, options: list[str]) -> dict[str, Any]:
    """All that decides what an arm becomes.

    Args:
        config (Path): Its config.
        options (list[str]): Its overrides.
    """
    settings = merged(config, options).to_dict()
    settings.pop("work_dir", None)
    return as_plain(settings)


def train_once(
    arm: str, config: Path, work_dir: Path, options: list[str], progress: Progress, start: Path | None = None
) -> float:
    """Train an arm unless it is done; go on from its last checkpoint where it was interrupted.

    Args:
        arm (str): Its name.
        config (Path): What is trained.
        work_dir (Path): Where to.
        options (list[str]): For ``--cfg-options``.
        progress (Progress): Shows the training.
        start (Path, optional): The checkpoint that its options name: one of the same name and other content makes it
            another arm.

    Returns:
        float: Wall-clock of its lives in seconds, as far as it is known.

    Raises:
        SystemExit: If the folder holds an arm with other settings, or one that is being trained, or the training fails.
    """
    settings = settings_of(config, options)
    if start is not None and start.is_file():
        settings["start"] = {"sha256": _digest(start)}
    record = record_of(work_dir, settings)
    if record is not None and record.done:
        progress.console.print(f"{arm}: done before, in {work_dir}", highlight=False, markup=False, soft_wrap=True)
        return record.wall_time_s
    work_dir.mkdir(parents=True, exist_ok=True)
    with alone_in(work_dir) as descriptors:
        resume = record is not None and _has_checkpoint(work_dir)
        if not resume:
            set_aside(work_dir)
        record = record or Record(work_dir, settings)
        record.write()
        before = record.wall_time_s

        def alive(seconds: float) -> None:
            record.wall_time_s = before + seconds
            record.write()

        seconds = train(arm, config, work_dir, options, progress, resume=resume, alive=alive, descriptors=descriptors)
        record.wall_time_s, record.done = before + seconds, True
        record.write()
    return record.wall_time_s


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _has_checkpoint(work_dir: Path) -> bool:
    note = work_dir / "last_checkpoint"
    return note.is_file() and Path(note.read_text().strip()).is_file()
