"""The figures of a comparison, as ``docs/demo.png``: quality over visits, and samples kept per pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .logs import labelled
from .runs import Arm

COLOURS = {
    "baseline": "#555555",
    "infobatch": "#d1495b",
    "shortened": "#3d7ea6",
    "random": "#e09f3e",
    "scratch": "#999999",
}


def comparison_figure(title: str, metric: str, arms: Mapping[str, Arm], path: Path) -> None:
    """Draw the metric over visits for all runs, and beside it the share of samples kept in each pass.

    Args:
        title (str): Of the figure.
        metric (str): Name of the metric.
        arms (Mapping[str, Arm]): The runs by name, one of :data:`COLOURS`.
        path (Path): The picture to write.
    """
    # A figure without pyplot: it needs no display, and leaves the user's choice of one alone.
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(title)
    quality_over_visits(left, metric, arms)
    kept_per_pass(right, arms)
    figure.savefig(path, dpi=120)


def quality_over_visits(axes: Axes, metric: str, arms: Mapping[str, Arm]) -> None:
    """Draw the metric at each validation over the sample visits before it, a line for each run."""
    for name, arm in arms.items():
        label = f"{name}, {arm.quality[-1]:.2f} at the end"
        size = 3 if len(arm.visits) > 1 else 8
        axes.plot(arm.visits, arm.quality, marker="o", markersize=size, color=COLOURS[name], label=label)
    axes.set(xlabel="sample visits", ylabel=labelled(metric), title="Quality over visits")
    axes.margins(x=0.06, y=0.15)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right" if all(len(arm.visits) > 1 for arm in arms.values()) else "best")


def kept_per_pass(axes: Axes, arms: Mapping[str, Arm]) -> None:
    """Draw the share of samples that each pruned run kept in each pass."""
    for name, arm in arms.items():
        if not arm.kept:
            continue
        passes, kept = range(1, len(arm.kept) + 1), [100 * share for share in arm.kept]
        if name == "infobatch":
            axes.bar(passes, kept, color=COLOURS[name], label=name)
        else:
            axes.step(passes, kept, where="mid", color=COLOURS[name], linewidth=2, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axhline(100, color=COLOURS["baseline"], linewidth=1)
    axes.set(xlabel="pass", ylabel="samples kept (%)", title="Kept per pass", ylim=(0, 108))
    if "random" in arms:
        axes.legend(loc="lower right")
