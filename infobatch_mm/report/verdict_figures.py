"""The figure of verdicts: differences to the full run and to the shorter one, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .figures import colours
from .logs import labelled
from .verdicts import FULL, Verdict

_TITLES = {FULL: "full", "shortened": "shortened to as many visits"}


def verdict_figure(title: str, metric: str, found: Sequence[Verdict], lower_is_better: bool, path: Path) -> None:
    """Draw the difference of each pruned arm to its opponents, with interval and margin.

    Args:
        title (str): Of the figure.
        metric (str): Name of the metric.
        found (Sequence[Verdict]): What :func:`.verdicts` found; those against the full and the shortened run are drawn.
        lower_is_better (bool): Whether the metric is a loss.
        path (Path): The picture to write.
    """
    kinds = [kind for kind in _TITLES if any(each.against == kind for each in found)]
    arms = list(dict.fromkeys(each.arm for each in found))
    figure = Figure(figsize=(1.5 + 4.5 * len(kinds), 1.7 + 0.55 * len(arms)), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        _differences(axes, [each for each in found if each.against == kind], arms)
        better = "lower" if lower_is_better else "higher"
        axes.set(title=f"against {_TITLES[kind]}", xlabel=f"difference in {labelled(metric)}, {better} is better")
        margin = next(each.margin for each in found if each.against == kind)
        if kind == FULL and margin is not None:
            at = margin if lower_is_better else -margin
            axes.axvline(at, color="#d1495b", linestyle="--", linewidth=1, label=f"margin {margin:g}")
            axes.legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=120)


def _differences(axes: Axes, found: Sequence[Verdict], arms: Sequence[str]) -> None:
    """Draw means and intervals, and the seeds themselves behind them."""
    colour = colours(arms)
    for each in found:
        height = arms.index(each.arm)
        measured = [difference for difference in each.differences.values() if math.isfinite(difference)]
        axes.plot(
            measured,
            [height - 0.22] * len(measured),
            "|",
            color=colour[each.arm],
            alpha=0.6,
            markersize=7,
        )
        middle = each.mean if math.isfinite(each.mean) else 0.0  # where the words stand
        if middle == each.mean:
            axes.plot(each.mean, height, "o", color=colour[each.arm], markersize=6)
        if each.interval is not None:
            ends = [each.interval.low, each.interval.high]
            axes.plot(ends, [height, height], "-", color=colour[each.arm], linewidth=2.5)
        axes.annotate(each.words, (middle, height), (0, -11), textcoords="offset points", ha="center", fontsize="small")
    axes.axvline(0, color="#555555", linewidth=1)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.grid(alpha=0.3, axis="x")
