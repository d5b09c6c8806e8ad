"""The scores: a file each, known by their names as soon as the package is imported."""

from ..core.score_rule import registered
from .ema import EmaScore
from .raw import RawScore
from .timestep import TimestepScore

#: Names of the scores of the package.
SCORES = tuple(registered())

__all__ = ["SCORES", "EmaScore", "RawScore", "TimestepScore"]
