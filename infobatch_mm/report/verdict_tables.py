"""The table of verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from .logs import labelled
from .verdicts import FULL, Verdict

_MEANINGS = {
    "lossless": "the worse end of the interval is within the margin.",
    "inferior": "the whole interval is beyond the margin.",
    "better": "than a control; the whole interval is on the better side of zero.",
    "worse": "than a control; the whole interval is on the worse side of zero.",
    "undecided": "more seeds are needed.",
}
_SHORT_WORDS = 26


def verdict_table(
    title: str, metric: str, found: Sequence[Verdict], lower_is_better: bool = False, decimals: int = 2
) -> Table:
    """Differences, intervals and verdicts of all pruned arms, and how they are to be read.

    Args:
        title (str): Title of the table.
        metric (str): Name of the metric.
        found (Sequence[Verdict]): What :func:`.verdicts` found.
        lower_is_better (bool): Whether the metric is a loss. Defaults to False.
        decimals (int): Of the metric. Defaults to 2.

    Returns:
        Table: For a console.
    """
    level = f"{100 * found[0].level:.4g} %"
    result = Table(title=title, caption=how_to_read(found, lower_is_better), caption_justify="left")
    for column in ("pruned arm", "against"):
        result.add_column(column, overflow="fold")
    result.add_column(f"difference in {labelled(metric)}", justify="right")
    result.add_column(f"{level} interval", justify="right")
    # Short words are never broken; reasons for having none leave room for the numbers.
    result.add_column("verdict", no_wrap=max(len(each.words) for each in found) <= _SHORT_WORDS, overflow="fold")
    form = f"+.{decimals}f"
    for each in found:
        ends = "-"
        if each.interval is not None:
            ends = f"{format(each.interval.low, form)} to {format(each.interval.high, form)}"
        result.add_row(
            each.arm, _opponent(each), format(each.mean, form) if math.isfinite(each.mean) else "-", ends, each.words
        )
    return result


def _opponent(verdict: Verdict) -> str:
    """The opponent as a table names it: by its kind, and by its name where it is another arm's control."""
    own = (verdict.against, "baseline", f"{verdict.against} for {verdict.arm}")
    return verdict.against if verdict.other in own else f"{verdict.against} ({verdict.other})"


def how_to_read(found: Sequence[Verdict], lower_is_better: bool) -> str:
    """What intervals and words of a table mean."""
    seeds, arms = len(found[0].differences), len({each.arm for each in found})
    margin = next(each.margin for each in found if each.against == FULL)
    lines = [f"Paired differences over {seeds} seed{'s' * (seeds > 1)}, Student's t, two-sided."]
    if arms > 1:
        lines.append(
            f"Each interval has the level 1 - 0.05/{arms}: against one kind of opponent, those of all {arms} pruned "
            "arms hold at once with 95 % (Bonferroni)."
        )
    if margin is None:
        lines.append("No margin stated (--margin): whether an arm is as good as the full run is left open.")
    else:
        lines.append(f"Margin against the full run: {margin:g} {'higher' if lower_is_better else 'lower'}.")
    # Only words that were said: none is to be read into a table that does not have it.
    said = " ".join(each.words for each in found)
    lines += [f"{word}: {meaning}" for word, meaning in _MEANINGS.items() if word in said]
    if any(each.interval is not None and not each.interval.has_width for each in found):
        lines.append("An interval of no width: the differences of all seeds are equal, which is no certainty.")
    return "\n".join(lines)
