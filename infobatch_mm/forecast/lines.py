"""A forecast as text and tables for a console."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from .advice import advice, unknown
from .estimates import INSIDE, Estimate
from .forecast import Forecast
from .table import WAYS, Row
from .whole import Whole

_WAYS = {**WAYS, "score": "scores of the run"}


def show(found: Forecast, console: Console) -> None:
    """Print a forecast."""
    measured = found.measured
    lines = [
        f"{len(measured)} of {found.num_samples:,} samples, each visited twice, one at a time; batches of "
        f"{found.batch_size}",
        *found.remarks,
        f"squared gradient norms: {found.between:.0%} of their variance is between samples, the rest between visits of "
        "the same one, which no score can know",
        f"limit {_shown(found.limit, '.2f')}: what a visit can be worth at most, in visits of uniform draws, where "
        "noise alone limits; from products of two visits' norms, so that their noise does not count",
        f"noise scale {_shown(found.noise_scale, ',.0f')} samples, {_number(found.noise, '.2f')} batches: at this "
        f"noise a visit can be worth {_shown(found.most, '.2f')} visits of a shorter training at most",
    ]
    if measured.left_out:
        lines.insert(1, f"{measured.left_out} samples without a finite gradient were left out")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_table(found.rows))
    if found.whole is not None:
        _show_whole(found.whole, found.num_samples, console)
    console.print(
        f"intervals: {INSIDE:.0%}, by resampling the samples; chances are held", highlight=False, soft_wrap=True
    )
    console.print("the forecast does not know:", highlight=False)
    for line in unknown():
        console.print(f"- {line}", highlight=False, soft_wrap=True)
    console.print(f"[bold]{advice(found)}[/bold]", highlight=False, soft_wrap=True)


def _show_whole(whole: Whole, num_samples: int, console: Console) -> None:
    console.print(
        f"all samples, by the scores of the run, of which {whole.num_scored:,} of {num_samples:,} have one: their "
        f"scores can reach a limit of {whole.reached:.2f}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_table(whole.rows, whole.checks, {**_WAYS, "calibrated": "scores, calibrated"}))


def _table(rows: Sequence[Row], checks: Sequence[Estimate] | None = None, ways: Mapping[str, str] = _WAYS) -> Table:
    shown = Table("policy", "goes by", "cost", "worth", "efficiency", "as good as a full run of length")
    if checks is not None:
        shown.add_column("efficiency by true gradients")
    for place, row in enumerate(rows):
        worth = row.worth
        cells = [row.policy, ways[row.way], f"{worth.cost:.2f}", "-" if worth.worth is None else f"{worth.worth:.2f}"]
        cells += ["-" if each is None else _shown(each, ".2f") for each in (row.efficiency, row.equal_length)]
        shown.add_row(*cells, *([] if checks is None else [_shown(checks[place], ".2f")]))
    return shown


def _shown(number: Estimate, form: str) -> str:
    ends = {_number(each, form) for each in (number.value, number.low, number.high)}
    if len(ends) == 1:
        return ends.pop()
    return f"{_number(number.value, form)} ({_number(number.low, form)} to {_number(number.high, form)})"


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "beyond what is seen"
