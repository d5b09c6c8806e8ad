"""Statistics over the seeds of a comparison, and its numbers on disk."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        dict: ``metric``, ``seeds``, and under ``mean`` and ``std`` one row for each arm; None where a seed has no
        finite value.
    """
    rows = list(seeds.values())
    columns = {arm: {key: [row[arm][key] for row in rows] for key in rows[0][arm]} for arm in rows[0]}

    def each(statistic: Callable[[Sequence[float]], float]) -> dict[str, dict[str, float | None]]:
        return {
            arm: {key: statistic(values) if are_finite(values) else None for key, values in row.items()}
            for arm, row in columns.items()
        }

    return {
        "metric": metric,
        "seeds": list(seeds),
        "mean": each(statistics.mean),
        "std": each(statistics.stdev),
    }


def are_finite(values: Iterable[float]) -> bool:
    """Whether all values were measured, and are numbers."""
    return all(map(math.isfinite, values))


def unmeasured(metric: str) -> dict[str, float]:
    """The row of an arm that could not be trained."""
    return dict.fromkeys((metric, "visits", "iterations", "wall_time_s"), math.nan)


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and standard deviation where there is one; ``-`` where a value is not finite.

    Args:
        values (Sequence[float]): One for each seed.
        form (str): Format of a number, e.g. ``'.2f'``.
    """
    if not are_finite(values):
        return "-"
    mean = format(statistics.mean(values), form)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean} ± {format(deviation, form.replace('+', ''))}" if deviation else mean


def write_numbers(path: Path, content: Mapping[str, Any]) -> None:
    """Write the numbers of a comparison as JSON, which knows no NaN: null for what is not finite."""
    path.write_text(json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n")


def _without_nan(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
