"""Train on fewer samples with no loss of quality: unbiased dynamic data pruning."""

from .core import InfoBatch, InfoBatchPolicy, NoPruning, Plan, PruningPolicy
from .version import __version__

__all__ = ["InfoBatch", "InfoBatchPolicy", "NoPruning", "Plan", "PruningPolicy", "__version__"]
