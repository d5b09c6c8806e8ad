"""The highest upper bounds of the loss."""

from __future__ import annotations

from ..core.annealed import AnnealedPolicy
from ..core.chances import Chances
from ..core.policy import Snapshot
from ..core.policy_registry import register_policy
from .epsilon_greedy import greedy


@register_policy
class UcbPolicy(AnnealedPolicy):
    """Visits the samples with the highest upper confidence bounds of their losses.

    Raju et al., 2021 (arXiv 2111.12621): the (1-r) N highest of ``E + c V``, the moving averages of a sample's loss and
    of its squared distance from that, which is ``score='ucb'``. No weights, no annealing: not unbiased. Differences:
    the paper keeps a choice for several passes, here each pass chooses again; samples without a score are visited.

    Args:
        prune_ratio (float): Share r of its visits that a pass saves, in [0, 1). Defaults to 0.5.
        delta (float): Share of the training after which pruning stops, in (0, 1]. Defaults to 1.
        target_saving (float, optional): As :class:`.AnnealedPolicy` takes it.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "ucb"
    needs_scores = True
    unbiased = False
    score = "ucb"

    def __init__(self, prune_ratio: float = 0.5, delta: float = 1.0, *, target_saving: float | None = None) -> None:
        super().__init__(prune_ratio, delta, target_saving=target_saving)

    def chances_at(self, snapshot: Snapshot, ratio: float) -> Chances | None:
        return greedy(snapshot, ratio, epsilon=0.0)
