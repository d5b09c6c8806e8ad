"""Statistics over the seeds of a comparison, and its numbers on disk."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: What each arm of one seed gave, by its name; see :meth:`.Arm.row`.
Rows = Mapping[str, Mapping[str, float]]


def means(metric: str, seeds: Mapping[int, Rows]) -> dict[str, object]:
    """Means and standard deviations over seeds, to keep.

    Args:
        metric (str): Name of the metric.
        seeds (Mapping[int, Rows]): The rows of each seed, two seeds or more.

    Returns:
        dict: ``metric``, ``seeds``, and under ``mean`` and ``std`` one row for each arm.
    """
    rows = list(seeds.values())
    columns = {arm: {key: [row[arm][key] for row in rows] for key in rows[0][arm]} for arm in rows[0]}
    return {
        "metric": metric,
        "seeds": list(seeds),
        "mean": {arm: {key: statistics.mean(values) for key, values in row.items()} for arm, row in columns.items()},
        "std": {arm: {key: statistics.stdev(values) for key, values in row.items()} for arm, row in columns.items()},
    }


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and standard deviation where there is one.

    Args:
        values (Sequence[float]): One for each seed.
        form (str): Format of a number, e.g. ``'.2f'``.
    """
    mean = format(statistics.mean(values), form)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean} ± {format(deviation, form.replace('+', ''))}" if deviation else mean


def write_numbers(path: Path, content: Mapping[str, Any]) -> None:
    """Write the numbers of a comparison as JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")
