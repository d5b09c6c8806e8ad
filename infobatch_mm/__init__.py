"""Train on fewer samples with no loss of quality: unbiased dynamic data pruning."""

from .core import InfoBatchPolicy, NoPruning, Plan, PruningPolicy, keeps_order, register_policy
from .loop import InfoBatch
from .version import __version__

__all__ = [
    "InfoBatch",
    "InfoBatchPolicy",
    "NoPruning",
    "Plan",
    "PruningPolicy",
    "__version__",
    "keeps_order",
    "register_policy",
]
