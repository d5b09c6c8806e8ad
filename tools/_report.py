"""What a comparison shows: tables, plots and numbers to keep."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from _arms import METRICS, Arm
from matplotlib.ticker import MaxNLocator
from rich.table import Table

COLOURS = {
    "baseline": "#555555",
    "infobatch": "#d1495b",
    "shortened": "#3d7ea6",
    "random": "#e09f3e",
    "scratch": "#999999",
}
#: Arm -> what it gave, see :meth:`_arms.Arm.row`.
Rows = Mapping[str, Mapping[str, float]]


def plot(title: str, metric: str, arms: Mapping[str, Arm], path: Path) -> None:
    """The metric over visits for all runs, and the share of samples kept in each pass."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(3, 2), layout="constrained")
    figure.suptitle(title)
    for name, arm in arms.items():
        label = f"{name}, {arm.quality[-1]:.2f} at the end"
        size = 3 if len(arm.visits) > 1 else 8
        left.plot(arm.visits, arm.quality, marker="o", markersize=size, color=COLOURS[name], label=label)
    left.set(xlabel="sample visits", ylabel=_labelled(metric), title="Quality over visits")
    left.margins(x=0.06, y=0.15)
    left.grid(alpha=0.3)
    left.legend(loc="lower right" if all(len(arm.visits) > 1 for arm in arms.values()) else "best")
    for name, arm in arms.items():
        if not arm.kept:
            continue
        passes, kept = range(1, len(arm.kept) + 1), [100 * share for share in arm.kept]
        if name == "infobatch":
            right.bar(passes, kept, color=COLOURS[name], label=name)
        else:
            right.step(passes, kept, where="mid", color=COLOURS[name], linewidth=2, label=name)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.axhline(100, color=COLOURS["baseline"], linewidth=1)
    right.set(xlabel="pass", ylabel="samples kept (%)", title="Kept per pass", ylim=(0, 108))
    if "random" in arms:
        right.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(
    title: str, metric: str, seeds: Sequence[Rows], decimals: int = 2, pruned: Sequence[str] = ("infobatch",)
) -> Table:
    """The arms side by side, and what the pruned ones saved; with several seeds, mean and standard deviation.

    Args:
        title (str): Title of the table.
        metric (str): Name of the metric.
        seeds (Sequence[Rows]): The rows of each seed.
        decimals (int): Of the metric. Defaults to 2.
        pruned (Sequence[str]): The arms to compare with the baseline. Defaults to that of InfoBatch.

    Returns:
        Table: For a console.
    """
    result = Table(title=title)
    for column in ("", _labelled(metric), "sample visits", "iterations", "wall-clock (s)"):
        result.add_column(column, justify="right" if column else "left", no_wrap=not column)
    costs = ("visits", "iterations", "wall_time_s")
    for arm in seeds[0]:
        quality = _spread([rows[arm][metric] for rows in seeds], f".{decimals}f")
        result.add_row(arm, quality, *(_spread([rows[arm][key] for rows in seeds], ",.0f") for key in costs))
    # By seed: what two arms of a seed have in common does not count as spread.
    for arm in pruned:
        gained = _spread([rows[arm][metric] - rows["baseline"][metric] for rows in seeds], f"+.{decimals}f")
        saved = ([1 - rows[arm][key] / rows["baseline"][key] for rows in seeds] for key in costs)
        label = "saved" if len(pruned) == 1 else f"saved by {arm}"
        result.add_row(label, f"({gained})", *(_spread(values, ".1%") for values in saved))
    return result


def means(metric: str, seeds: Mapping[int, Rows]) -> dict[str, object]:
    """Means and standard deviations over seeds, to keep."""
    rows = list(seeds.values())
    columns = {arm: {key: [row[arm][key] for row in rows] for key in rows[0][arm]} for arm in rows[0]}
    return {
        "metric": metric,
        "seeds": list(seeds),
        "mean": {arm: {key: statistics.mean(values) for key, values in row.items()} for arm, row in columns.items()},
        "std": {arm: {key: statistics.stdev(values) for key, values in row.items()} for arm, row in columns.items()},
    }


def _spread(values: Sequence[float], form: str) -> str:
    """Mean, and standard deviation where there is one."""
    mean = format(statistics.mean(values), form)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean} ± {format(spread, form.replace('+', ''))}" if spread else mean


def _labelled(metric: str) -> str:
    return f"{metric} (%)" if metric in METRICS else metric
