"""Arguments of policies, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..core.checks import is_number, plain, what_is_wrong
from ..core.score_file import SCORES_FILES, read_scores


def checked_share(name: str, value: Any, meaning: str, interval: str = "(0, 1)") -> float:
    """A setting between 0 and 1.

    Args:
        name (str): The setting's name, for the message.
        value: What the user gave.
        meaning (str): What it is, and what to give, for the message.
        interval (str): ``'(0, 1)'``, with a square bracket where an end belongs to it. Defaults to ``'(0, 1)'``.

    Raises:
        ValueError: If it is no number in the interval.
    """
    number = plain(value)
    inside = is_number(value) and (
        0 < number < 1 or (number == 0 and "[0" in interval) or (number == 1 and "1]" in interval)
    )
    if not inside:
        raise ValueError(f"{name}={value!r} {what_is_wrong(value, interval)}: it is {meaning}")
    return float(number)


def classes_in(classes: Any) -> np.ndarray:
    """The class of each sample, of a ``.npy`` file or of the numbers themselves: shape ``(N,)``, whole numbers.

    Raises:
        ValueError: If there is no such file, or it holds something else.
    """
    if isinstance(classes, (str, Path)):
        if Path(classes).suffix != ".npy" or not Path(classes).is_file():
            raise ValueError(f"classes={str(classes)!r} is no .npy file: numpy.save() the class of each sample there")
        found = np.load(classes, allow_pickle=False)
    else:
        found = np.asarray(classes)
    if found.ndim != 1 or not len(found) or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(
            f"classes holds {found.dtype} of shape {found.shape}: give one whole number for each sample, shape (N,)"
        )
    return found


def scores_at(path: Path) -> np.ndarray:
    """The scores in a file, or in the directory of a run: shape ``(N,)``, float64; NaN for none.

    Raises:
        ValueError: If there are none, or the file holds something else.
    """
    folder = path.parent if path.name in SCORES_FILES else path
    if path.suffix == ".npy" and path.is_file():
        found = np.load(path, allow_pickle=False)
    elif any((folder / name).is_file() for name in SCORES_FILES):
        found = read_scores(folder)["score"]
    else:
        raise ValueError(
            f"scores={str(path)!r} is neither a .npy file nor the directory of a run that left {SCORES_FILES[0]} or "
            f"{SCORES_FILES[1]}"
        )
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.number):
        raise ValueError(f"scores={str(path)!r} holds {found.dtype} of shape {found.shape}, expected numbers, (N,)")
    return found.astype(np.float64)
