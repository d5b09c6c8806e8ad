"""The figures of a comparison, as ``docs/demo.png``: quality over visits, and samples kept per pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .logs import labelled
from .runs import Arm

#: Arms that most comparisons have.
_COLOURS = {
    "baseline": "#555555",
    "infobatch": "#d1495b",
    "shortened": "#3d7ea6",
    "random": "#e09f3e",
    "smaller": "#6a994e",
    "unweighted": "#b983b5",
    "scratch": "#999999",
}
# For all others, in their order.
_PALETTE = ("#8b1e3f", "#1b9e9e", "#7048a8", "#a0522d", "#e76f9a", "#2a5d34", "#f4a582", "#4c72b0")

# With more arms, one legend for both panels stands below them.
_MOST_IN_PANEL = 5


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each arm; the palette repeats where there are many."""
    names = list(names)
    others = [name for name in names if name not in _COLOURS]
    return {name: _COLOURS.get(name) or _PALETTE[others.index(name) % len(_PALETTE)] for name in names}


def comparison_figure(title: str, metric: str, arms: Mapping[str, Arm], path: Path) -> None:
    """Draw the metric over visits for all runs, and beside it the share of samples kept in each pass.

    Args:
        title (str): Of the figure.
        metric (str): Name of the metric.
        arms (Mapping[str, Arm]): The runs by name.
        path (Path): The picture to write.
    """
    # A figure without pyplot: it needs no display, and leaves the user's choice of one alone.
    many = len(arms) > _MOST_IN_PANEL
    figure = Figure(figsize=(10, 4 + 0.12 * len(arms) * many), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(title)
    quality_over_visits(left, metric, arms)
    kept_per_pass(right, arms)
    if many:  # legends within the panels would hide the lines
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
        for axes in (left, right):
            if (legend := axes.get_legend()) is not None:
                legend.remove()
    figure.savefig(path, dpi=120)


def quality_over_visits(axes: Axes, metric: str, arms: Mapping[str, Arm]) -> None:
    """Draw the metric at each validation over the sample visits before it, a line for each run."""
    colour = colours(arms)
    for name, arm in arms.items():
        last = arm.quality[-1]
        label = f"{name}, {last:.2f} at the end" if math.isfinite(last) else f"{name}, not measured"
        size = 3 if len(arm.visits) > 1 else 8
        axes.plot(arm.visits, arm.quality, marker="o", markersize=size, color=colour[name], label=label)
    axes.set(xlabel="sample visits", ylabel=labelled(metric), title="Quality over visits")
    axes.margins(x=0.06, y=0.15)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right" if all(len(arm.visits) > 1 for arm in arms.values()) else "best")


def kept_per_pass(axes: Axes, arms: Mapping[str, Arm]) -> None:
    """Draw the share of samples that each pruned run kept in each pass."""
    colour = colours(arms)
    pruned = {name: arm.kept for name, arm in arms.items() if arm.kept}
    for name, shares in pruned.items():
        passes, kept = range(1, len(shares) + 1), [100 * share for share in shares]
        if name == "infobatch":
            axes.bar(passes, kept, color=colour[name], label=name)
        else:
            axes.step(passes, kept, where="mid", color=colour[name], linewidth=2, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axhline(100, color=_COLOURS["baseline"], linewidth=1)
    axes.set(xlabel="pass", ylabel="samples kept (%)", title="Kept per pass", ylim=(0, 108))
    if len(pruned) > 1:
        axes.legend(loc="lower right")
