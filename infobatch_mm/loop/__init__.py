"""Pruning in any PyTorch loop: the object, its loader, its learning-rate schedule."""

from .infobatch import InfoBatch
from .loader import PassLoader
from .scheduler import ProgressScheduler

__all__ = ["InfoBatch", "PassLoader", "ProgressScheduler"]
