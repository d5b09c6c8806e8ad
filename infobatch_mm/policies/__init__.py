"""The policies: a file each, known by their names as soon as the package is imported."""

from .infobatch import InfoBatchPolicy
from .none import NoPruning
from .random import RandomPolicy

__all__ = ["InfoBatchPolicy", "NoPruning", "RandomPolicy"]
