"""Train on fewer samples with no loss of quality: unbiased dynamic data pruning."""

from . import scores as _scores  # noqa: F401 - known by their names from here on
from .core import AnnealedPolicy, Chances, Plan, PruningPolicy, Snapshot, Thinning, keeps_order, register_policy
from .core.score_rule import ScoreRule, register_score
from .loop import InfoBatch
from .policies import InfoBatchPolicy, NoPruning, RandomPolicy, VariancePolicy
from .version import __version__

__all__ = [
    "AnnealedPolicy",
    "Chances",
    "InfoBatch",
    "InfoBatchPolicy",
    "NoPruning",
    "Plan",
    "PruningPolicy",
    "RandomPolicy",
    "ScoreRule",
    "Snapshot",
    "Thinning",
    "VariancePolicy",
    "__version__",
    "keeps_order",
    "register_policy",
    "register_score",
]
