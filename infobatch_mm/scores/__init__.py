"""The scores: a file each, known by their names as soon as the package is imported."""

from ..core.score_rule import registered
from .bls import BatchLossScore
from .ema import EmaScore
from .forgetting import ForgettingScore
from .gradient import GradientScore
from .raw import RawScore
from .second_difference import SecondDifferenceScore
from .timestep import TimestepScore
from .ucb import UcbScore
from .window import WindowScore

#: Names of the scores of the package.
SCORES = tuple(registered())

__all__ = [
    "SCORES",
    "BatchLossScore",
    "EmaScore",
    "ForgettingScore",
    "GradientScore",
    "RawScore",
    "SecondDifferenceScore",
    "TimestepScore",
    "UcbScore",
    "WindowScore",
]
