"""What follows from a forecast, in one sentence, and what it does not know."""

from __future__ import annotations

from ..policies.auto import BAR
from .estimates import Estimate
from .forecast import Forecast
from .table import Row, at


def advice(found: Forecast) -> str:
    """What to do: train shorter, or draw by gradient."""
    limit, shorter = found.limit, 1 - 1 / found.limit.value
    if shorter < 0.005:
        return (
            "no unbiased pruning can save a visit here that training shorter does not save as well (limit "
            f"{_shown(limit, '.2f')}): gradients are of one size"
        )
    if limit.value < BAR:
        return (
            f"no unbiased pruning can save more than {shorter:.0%} of a run that is as good "
            f"(limit {_shown(limit, '.2f')}): to save as many visits, train {shorter:.0%} shorter, and measure what "
            "that costs"
        )
    if found.most.value < BAR:
        return (
            f"noise does not limit here (noise scale over batch size {found.noise:.2g}): whatever the draw, a visit is "
            f"worth at most {_shown(found.most, '.2f')} visits of a shorter training; training shorter is as good as "
            "any draw"
        )
    best = _best(found)
    if best is None:
        return f"gradients differ (limit {_shown(limit, '.2f')}), but no last layer is known: only losses rank samples"
    assert best.equal_length is not None and best.efficiency is not None
    what = (
        f"draws by gradient at a saving of {best.saving:.0%} are worth {_shown(best.equal_length, '.0%')} of a full "
        f"run; shortened to as many visits is worth {best.worth.cost:.0%}"
    )
    if best.efficiency.low > 1:
        return f"{what}. Gradient noise is not quality: confirm it by infobatch-mm compare and its controls"
    return f"gradients differ (limit {_shown(limit, '.2f')}), but the score does not find which: {what}; train shorter"


def unknown() -> list[str]:
    """What a forecast does not know, a line each."""
    return [
        "the moment: it holds for this checkpoint; early in a training gradients differ in other ways",
        "the learning rate: smaller or fewer steps are compared at a rate that suits each, which nobody has tuned",
        "stale scores: draws are judged by scores of the same weights, a run's are up to a pass old",
        "batch statistics: losses under batch normalisation do not separate over samples",
        "first passes and annealing: savings are of a pruned pass, full ones save nothing",
    ]


def _best(found: Forecast) -> Row | None:
    """Of the draws by the last layer's gradient the one that gains most visits on a shorter training."""
    rows = [row for row in at(found.rows, policy="variance", way="gradient") if row.equal_length is not None]
    return max(rows, key=lambda row: row.equal_length.value - row.worth.cost, default=None)  # type: ignore[union-attr]


def _shown(number: Estimate, form: str) -> str:
    return f"{number.value:{form}} [{number.low:{form}}, {number.high:{form}}]"
