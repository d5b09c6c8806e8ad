"""The summary that a run leaves behind in its directory."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .score_file import write_scores
from .store import ScoreStore

SUMMARY_FILE = "infobatch_summary.json"

#: Settings by which a summary is known to belong to the same run.
_IDENTITY = ("policy", "prune_ratio", "delta", "num_samples")


def write_summary(work_dir: str, summary: dict[str, Any]) -> None:
    """Write ``infobatch_summary.json`` in one step, so that a reader never finds half of it."""
    path = Path(work_dir, SUMMARY_FILE)
    partial = path.with_suffix(".json.tmp")
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(partial, path)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What of ``here`` is otherwise there, by name and both values, for a refusal; '' where nothing is."""
    return "; ".join(
        f"{name}: {there.get(name)!r} there, {value!r} here" for name, value in here.items() if there.get(name) != value
    )


def check_summary(work_dir: str, summary: dict[str, Any]) -> None:
    """Refuse to resume into a work directory whose summary belongs to another run.

    Raises:
        ValueError: With both values and the file.
    """
    path = Path(work_dir, SUMMARY_FILE)
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return  # nothing to compare with: the checkpoint's own state is checked in any case
    for key in _IDENTITY:
        if key in found and found[key] != summary[key]:
            raise ValueError(
                f"cannot resume: {path} belongs to a run with {key}={found[key]!r}, this run has "
                f"{key}={summary[key]!r}; use its settings, or another directory"
            )


def write_run(
    output_dir: str | os.PathLike[str],
    summary: dict[str, Any],
    store: ScoreStore,
    names: Sequence[str] | Iterable[Sequence[str]] | None = None,
) -> None:
    """Write the summary and the scores of a run; a full disk must not end a training, and only warns.

    Args:
        output_dir (str | PathLike): Where to; made if it is not there.
        summary (dict): See :func:`write_summary`.
        store (ScoreStore): See :func:`.write_scores`.
        names (Sequence[str] | Iterable[Sequence[str]], optional): See :func:`.write_scores`.
    """
    try:
        os.makedirs(output_dir, exist_ok=True)
        write_summary(str(output_dir), summary)
        write_scores(str(output_dir), store, names)
    except OSError as error:
        warnings.warn(f"InfoBatch could not write to {output_dir}: {error}", stacklevel=3)
