"""Scores, plans, policies and samplers; knows torch and numpy only."""

from .annealed import AnnealedPolicy
from .chances import Chances, Thinning
from .collate import keeps_order
from .plan import Plan, full_plan, thinned_plan
from .policy import PruningPolicy, Snapshot
from .policy_registry import build_policy, register_policy
from .pruner import Pruner
from .sampler import PlanSampler
from .schedule import EpochSchedule, IterSchedule, Schedule
from .score_file import read_scores
from .store import ScoreStore
from .training import Training
from .watcher import Watcher

__all__ = [
    "AnnealedPolicy",
    "Chances",
    "EpochSchedule",
    "IterSchedule",
    "Plan",
    "PlanSampler",
    "Pruner",
    "PruningPolicy",
    "Schedule",
    "ScoreStore",
    "Snapshot",
    "Thinning",
    "Training",
    "Watcher",
    "build_policy",
    "full_plan",
    "keeps_order",
    "read_scores",
    "register_policy",
    "thinned_plan",
]
