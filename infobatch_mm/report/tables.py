"""The table of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from .logs import labelled
from .seeds import Rows, spread

# Names of arms up to this length are never broken; longer ones leave room for the numbers.
_SHORT_NAME = 20


def comparison_table(
    title: str, metric: str, seeds: Sequence[Rows], decimals: int = 2, pruned: Sequence[str] = ("infobatch",)
) -> Table:
    """The arms side by side, and what the pruned ones saved; with several seeds, mean and standard deviation.

    Args:
        title (str): Title of the table.
        metric (str): Name of the metric.
        seeds (Sequence[Rows]): The rows of each seed.
        decimals (int): Of the metric. Defaults to 2.
        pruned (Sequence[str]): The arms to compare with the baseline. Defaults to InfoBatch's alone.

    Returns:
        Table: For a console.
    """
    result = Table(title=title)
    for column in ("", labelled(metric), "sample visits", "iterations", "wall-clock (s)"):
        whole = not column and max(map(len, seeds[0])) <= _SHORT_NAME
        result.add_column(column, justify="right" if column else "left", no_wrap=whole, overflow="fold")
    costs = ("visits", "iterations", "wall_time_s")
    for arm in seeds[0]:
        quality = spread([rows[arm][metric] for rows in seeds], f".{decimals}f")
        result.add_row(arm, quality, *(spread([rows[arm][key] for rows in seeds], ",.0f") for key in costs))
    # By seed: what two arms of a seed have in common does not count as spread.
    for arm in pruned:
        gains = spread([rows[arm][metric] - rows["baseline"][metric] for rows in seeds], f"+.{decimals}f")
        saved = ([saved_share(rows, arm, key) for rows in seeds] for key in costs)
        label = "saved" if len(pruned) == 1 else f"saved by {arm}"
        result.add_row(label, "-" if gains == "-" else f"({gains})", *(spread(values, ".1%") for values in saved))
    return result


def saved_share(rows: Rows, arm: str, key: str) -> float:
    """Share of a cost of the baseline that an arm saved; NaN where the baseline had none."""
    full = rows["baseline"][key]
    return 1 - rows[arm][key] / full if full else math.nan
