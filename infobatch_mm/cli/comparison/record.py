"""What is known of an arm that was begun: its settings, its time, and whether it is done."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from .settings import as_plain, differing

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]

#: In the folder of each arm.
RECORD_FILE = "arm.json"
_LOCK_FILE = "arm.lock"


@dataclass
class Record:
    """The file ``arm.json`` of one arm.

    Attributes:
        work_dir (Path): The arm's folder.
        settings (dict): Of its training, see :func:`.as_plain`.
        wall_time_s (float): Wall-clock of all its lives, in seconds, as far as it is known.
        done (bool): Whether it has ended well.
    """

    work_dir: Path
    settings: dict[str, Any]
    wall_time_s: float = 0.0
    done: bool = False

    def write(self) -> None:
        """Write the file in one step, so that a kill never leaves half of it."""
        path = self.work_dir / RECORD_FILE
        partial = path.with_suffix(".json.tmp")
        content = {"done": self.done, "wall_time_s": round(self.wall_time_s, 3), "settings": self.settings}
        partial.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(partial, path)


def record_of(work_dir: Path, settings: dict[str, Any]) -> Record | None:
    """The record that a folder holds.

    Args:
        work_dir (Path): Folder of an arm; need not be there.
        settings (dict): What is to be trained there.

    Returns:
        Record | None: None where nothing was begun.

    Raises:
        SystemExit: If an arm with other settings was, with both values.
    """
    found = _read(work_dir)
    if found is None:
        return None
    if differ := differing(found["settings"], as_plain(settings), ("there", "here")):
        raise SystemExit(
            f"{work_dir} holds an arm with other settings ({differ}): delete that folder, or use another --work-dir"
        )
    return Record(work_dir, found["settings"], float(found["wall_time_s"]), bool(found["done"]))


def seed_of(work_dir: Path) -> int | None:
    """The seed of the arm that a folder holds; None where nothing was begun."""
    found = _read(work_dir)
    return None if found is None else found["settings"].get("randomness", {}).get("seed")


def place_for(work_dir: Path, settings: dict[str, Any]) -> Path:
    """The first of a folder and its namesakes ``NAME-2``, ``NAME-3`` that holds no arm with other settings.

    Controls go there: which visits ``random`` makes depends on what other arms there are.
    """
    namesakes = (work_dir.with_name(f"{work_dir.name}-{number}") for number in count(2))
    return next(place for place in chain([work_dir], namesakes) if _is_free(place, settings))


def _is_free(work_dir: Path, settings: dict[str, Any]) -> bool:
    found = _read(work_dir)
    return found is None or not differing(found["settings"], as_plain(settings), ("there", "here"))


def _read(work_dir: Path) -> dict[str, Any] | None:
    path = work_dir / RECORD_FILE
    return json.loads(path.read_text()) if path.is_file() else None


@contextmanager
def alone_in(work_dir: Path) -> Iterator[tuple[int, ...]]:
    """Hold the folder of an arm for one training.

    Yields:
        tuple[int, ...]: File descriptors for the training's process. It holds the folder with them also after a kill
        of this process has left it alone.

    Raises:
        SystemExit: If a training goes on there.
    """
    if fcntl is None:
        yield ()
        return
    with (work_dir / _LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(
                f"another training goes on in {work_dir}, perhaps of a comparison that was killed: end it, or wait"
            ) from None
        yield (file.fileno(),)
