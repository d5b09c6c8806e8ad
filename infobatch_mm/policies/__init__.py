"""The policies: a file each, known by their names as soon as the package is imported."""

from .auto import AutoPolicy
from .class_budgets import ClassBudgetsPolicy
from .epsilon_greedy import EpsilonGreedyPolicy
from .ies import IesPolicy
from .infobatch import InfoBatchPolicy
from .kakurenbo import KakurenboPolicy
from .none import NoPruning
from .orderdp import OrderDpPolicy
from .progressive_dropout import ProgressiveDropoutPolicy
from .random import RandomPolicy
from .repb import RepbPolicy
from .scan import ScanPolicy
from .seta import SetaPolicy
from .static import StaticPolicy
from .ucb import UcbPolicy
from .variance import VariancePolicy

__all__ = [
    "AutoPolicy",
    "ClassBudgetsPolicy",
    "EpsilonGreedyPolicy",
    "IesPolicy",
    "InfoBatchPolicy",
    "KakurenboPolicy",
    "NoPruning",
    "OrderDpPolicy",
    "ProgressiveDropoutPolicy",
    "RandomPolicy",
    "RepbPolicy",
    "ScanPolicy",
    "SetaPolicy",
    "StaticPolicy",
    "UcbPolicy",
    "VariancePolicy",
]
