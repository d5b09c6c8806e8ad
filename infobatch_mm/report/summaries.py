"""The summary that a pruned run left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core.summary import SUMMARY_FILE

#: What visits were called in summaries of earlier versions.
_NAMES_BEFORE = {"visits": "samples_seen", "visits_full": "samples_full"}


def read_summary(work_dir: Path) -> dict[str, Any] | None:
    """Read ``infobatch_summary.json`` of a run.

    Args:
        work_dir (Path): Where the run left it.

    Returns:
        dict: Its fields, under the names of today; None where the run was not pruned.
    """
    path = work_dir / SUMMARY_FILE
    if not path.is_file():
        return None
    summary = json.loads(path.read_text())
    for name, before in _NAMES_BEFORE.items():
        if before in summary:
            summary.setdefault(name, summary.pop(before))
    return summary
