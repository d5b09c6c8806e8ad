"""Scores, plans, policies and samplers; knows torch and numpy only."""

from .infobatch import InfoBatch
from .plan import Plan, full_plan, thinned_plan
from .policies import InfoBatchPolicy, NoPruning, PruningPolicy, build_policy
from .pruner import Pruner
from .sampler import PlanSampler
from .schedule import EpochSchedule, IterSchedule, Schedule
from .scores import ScoreStore

__all__ = [
    "EpochSchedule",
    "InfoBatch",
    "InfoBatchPolicy",
    "IterSchedule",
    "NoPruning",
    "Plan",
    "PlanSampler",
    "Pruner",
    "PruningPolicy",
    "Schedule",
    "ScoreStore",
    "build_policy",
    "full_plan",
    "thinned_plan",
]
