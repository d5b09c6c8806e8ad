"""No pruning: the host's own order, with scores recorded."""

from __future__ import annotations

from ..core.policy import PruningPolicy, Snapshot, Thinning
from ..core.policy_registry import register_policy


@register_policy
class NoPruning(PruningPolicy):
    """Every sample in every pass with weight 1; scores are still recorded."""

    name = "none"

    def is_active(self, progress: float) -> bool:
        return False

    def chances(self, snapshot: Snapshot) -> Thinning | None:
        return None
