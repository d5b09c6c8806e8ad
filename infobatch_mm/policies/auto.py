"""Draws in proportion to gradients where they can pay, full passes where they cannot."""

from __future__ import annotations

from typing import Any

from ..core.annealed import PI_MIN
from ..core.chances import Chances, Thinning
from ..core.checks import is_number, plain, what_is_wrong
from ..core.policy import Snapshot
from ..core.policy_registry import register_policy
from ..core.worth import limit
from .variance import VariancePolicy

#: Limit from which on draws by gradient may pay.
BAR = 1.5


@register_policy
class AutoPolicy(VariancePolicy):
    """Prunes by :class:`.VariancePolicy` where the limit reaches a bar, and otherwise visits every sample and says so.

    The limit, ``1 + cv(h)**2``, is how many uniform visits one visit can be worth at most, whatever the unbiased
    pruning. It is told from the scores when a pass is planned. What it cannot tell: whether noise limits the training
    at all (``infobatch-mm plan`` does).

    Args:
        prune_ratio (float): Share of its visits that a pruned pass saves, in [0, 1). Defaults to 0.5.
        delta (float): Share of the training after which pruning stops, in (0, 1]. Defaults to 1.
        pi_min (float): Smallest chance of a sample, in (0, 1]. Defaults to 0.1.
        bar (float): Limit from which on a pass is pruned, at least 1. Defaults to 1.5: below it no pruning can save a
            third of a run that is as good, and scores reach a part of that only.
        options: ``target_saving``, ``min_worth``, ``rescale``, ``keep``, ``lr_rule`` as :class:`.AnnealedPolicy` takes
            them. A target may be missed: below the bar nothing is saved.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "auto"
    why_less = "passes whose limit is below bar visit every sample; train shorter, or lower bar"

    def __init__(
        self, prune_ratio: float = 0.5, delta: float = 1.0, pi_min: float = PI_MIN, bar: float = BAR, **options: Any
    ) -> None:
        super().__init__(prune_ratio, delta, pi_min, **options)
        if not is_number(bar) or plain(bar) < 1:
            raise ValueError(
                f"bar={bar!r} {what_is_wrong(bar, '[1, inf)')}: it is the limit from which on a pass is pruned; use "
                f"{BAR}, or 1 to prune in any case"
            )
        self.bar = float(bar)

    @property
    def needs_norms(self) -> bool:
        return True

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "bar": self.bar}

    def chances(self, snapshot: Snapshot) -> Chances | Thinning | None:
        norms = snapshot.norms()
        return None if norms is None or limit(norms) < self.bar else super().chances(snapshot)

    def remark(self, limit: float | None) -> tuple[str, str] | None:
        if limit is None:
            return None
        if limit >= self.bar:
            return "policy 'auto' prunes", f"by the scores, the limit is {limit:.2f}, at or above bar={self.bar}"
        most = f"{1 - 1 / limit:.1%}"
        return (
            "policy 'auto' visits every sample",
            f"by the scores, the limit is {limit:.2f}, below bar={self.bar}. No unbiased pruning can save more than "
            f"{most} of a run that is as good: to save as many visits, train {most} shorter, and measure what that "
            "costs",
        )
