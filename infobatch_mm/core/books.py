"""The books of a training: what each pass visited, and what the unpruned run would have visited by then."""

from __future__ import annotations

from typing import Any

import numpy as np

from .distributed import Group, gather, world_size
from .plan import Plan
from .policy import PruningPolicy
from .schedule import Schedule
from .store import ScoreStore
from .worth import FIGURES, Worth, pass_worth, sampled_norms


class Books:
    """Where a training stands, and what it has visited so far; :class:`.Pruner` moves it on.

    Args:
        schedule (Schedule): The host's training as passes over the data.
        policy (PruningPolicy): What to visit.
        store (ScoreStore): The scores.
        seed (int): Seed of all draws.
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.

    Attributes:
        schedule (Schedule): As above, like ``policy``, ``store``, ``seed`` and ``group``.
        plan (Plan, optional): The plan in flight.
        pass_index (int): Number of finished passes.
        visited (int): Visits of the plan in flight that were handed out, over all processes: the position in it.
        own_skipped (int): Of these, visits that this process did not weigh, and has not told the others of.
        visits_before (int): Visits that no pass in :attr:`history` accounts for, as of a run that was not pruned so
            far, or of a pass that was drawn again.
        full_before (int): What the unpruned run would have made in their place, as far as it differs from what
            the schedule says.
        forward_visits (int): Visits that only estimated running statistics, without a backward pass; none of the
            others.
        last_pruned (int): The last pass whose plan left samples out; -1 before there is one.
        history (list[dict]): One entry per finished pass: ``pass, kept, skipped, kept_ratio, threshold, score_mean``,
            and of its :class:`.Worth` ``worth, cost, efficiency, limit``; ``kept`` counts visits that were weighed,
            ``skipped`` visits that were only handed out.
    """

    def __init__(
        self, schedule: Schedule, policy: PruningPolicy, store: ScoreStore, seed: int, group: Group = None
    ) -> None:
        self.schedule, self.policy, self.store = schedule, policy, store
        self.seed, self.group = seed, group
        self.plan: Plan | None = None
        self.pass_index = 0
        self.visited = 0
        self.own_skipped = 0
        self._skipped = 0  # what all processes know of
        self._corrections: dict[int, int] = {}
        self.visits_before = 0
        self.full_before = 0
        self.forward_visits = 0
        self.last_pruned = -1
        self.history: list[dict[str, Any]] = []
        self._booked = {"kept": 0, "skipped": 0}  # sums over the history, which has thousands of passes at times

    # ---- where it stands --------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the whole schedule is done."""
        return self.pass_index >= self.schedule.num_passes

    @property
    def is_active(self) -> bool:
        """Whether the policy prunes the current pass."""
        return self.policy.is_active(self.schedule.progress(self.pass_index))

    @property
    def pass_done(self) -> bool:
        """Whether every visit of the plan in flight is done."""
        return self.plan is not None and self.visited >= len(self.plan)

    @property
    def skipped(self) -> int:
        """Visits of the plan in flight that were handed out and not weighed, as far as this process knows."""
        return self._skipped + self.own_skipped

    # ---- booking ----------------------------------------------------------------------------------

    def advance(self, visits: int) -> None:
        """Count visits of the plan in flight, over all processes."""
        self.visited += visits

    def correct(self, pass_index: int, weighed: int) -> None:
        """Book visits that this process weighed only after their pass had been booked."""
        if world_size(self.group) == 1:
            self._weighed_later(pass_index, weighed)
        else:
            self._corrections[pass_index] = self._corrections.get(pass_index, 0) + weighed

    def merge(self) -> None:
        """Exchange scores and counts of this pass among the processes; every process must call it."""
        self.store.merge()
        skipped, corrections = zip(*gather((self.own_skipped, self._corrections), self.group), strict=True)
        self._skipped += sum(skipped)
        self.own_skipped, self._corrections = 0, {}
        for pass_index, weighed in (each for own in corrections for each in own.items()):
            self._weighed_later(pass_index, weighed)

    def _weighed_later(self, pass_index: int, visits: int) -> None:
        for entry in self.history:
            if entry["pass"] == pass_index:
                fewer = min(entry.get("skipped", 0), visits)
                entry["kept"] += visits
                entry["skipped"] = entry.get("skipped", 0) - fewer
                self._booked["kept"] += visits
                self._booked["skipped"] -= fewer
                entry["kept_ratio"] = self._kept_ratio(pass_index, entry["kept"])

    def _book(self, history: list[dict[str, Any]]) -> None:
        """Take over entries of finished passes."""
        self.history = history
        for key in self._booked:
            self._booked[key] = sum(entry.get(key, 0) for entry in history)

    def _entry(self) -> dict[str, Any]:
        """The books of the pass in hand, as if it was over."""
        # Repeated visits, which round a full pass up, do not count.
        visited = self.visited if self.plan is None else min(self.visited, len(self.plan))
        kept = visited - self.skipped
        return {
            "pass": self.pass_index,
            "kept": kept,
            "skipped": self.skipped,
            "kept_ratio": self._kept_ratio(self.pass_index, kept),
            "threshold": None if self.plan is None else self.plan.threshold,
            "score_mean": self.score_mean,
            **_figures(self._worth()),
        }

    def _worth(self) -> Worth | None:
        """What the pass in hand is worth, by the scores it was planned with."""
        return None if self.plan is None else self.plan.worth

    def _kept_ratio(self, pass_index: int, kept: int) -> float:
        return kept / max(1, self.schedule.full_visits(pass_index))

    def _stand_at_begin(self) -> None:
        self.visited = self._skipped = self.own_skipped = 0

    # ---- what they say ----------------------------------------------------------------------------

    @property
    def score_mean(self) -> float | None:
        """Mean score of the seen samples, None while there is none."""
        if not self.store.seen.any():
            return None
        return float(np.mean(self.store.values.numpy(), where=self.store.seen.numpy(), dtype=np.float64))

    @property
    def full_worth(self) -> Worth | None:
        """What a full pass is worth by the scores so far; None where they do not tell."""
        norms = sampled_norms(self.store.values.numpy(), self.store.seen.numpy(), self.store.rule.norms)
        return None if norms is None else pass_worth(norms)

    @property
    def limit(self) -> float | None:
        """Largest efficiency of any unbiased pruning by the scores so far; None where they do not tell."""
        worth = self.full_worth
        return None if worth is None else worth.limit

    @property
    def unscored(self) -> int:
        """Samples that were visited and have no score, over all processes as far as this one knows."""
        return self.store.num_unscored

    @property
    def visits(self) -> int:
        """Visits made so far, over all processes: weighed ones."""
        return self.visits_before + self._booked["kept"] + self.visited - self.skipped

    @property
    def visits_skipped(self) -> int:
        """Visits that were handed out and not weighed, over all processes as far as this one knows."""
        return self._booked["skipped"] + self.skipped

    @property
    def visits_full(self) -> int:
        """Visits that the unpruned run would have made at the same progress."""
        full = self.full_before + self.schedule.full_visits_before(self.pass_index)
        if self.plan is None:
            return full + self.visited
        return full + self.schedule.full_visits(self.pass_index) * self.visited // max(1, len(self.plan))

    @property
    def saved_ratio(self) -> float:
        """Share of visits avoided so far, in [0, 1). One that was handed out was not avoided, weighed or not."""
        handed_out = self.visits + self.visits_skipped
        return 1 - handed_out / self.visits_full if self.visits_full else 0.0

    def scalars(self) -> dict[str, float]:
        """What a host logs of the last finished pass, as far as it is known; empty before there is one."""
        if not self.history:
            return {}
        entry = self.history[-1]
        scalars = {
            "infobatch/kept_ratio": entry["kept_ratio"],
            "infobatch/saved_ratio": self.saved_ratio,
            "infobatch/threshold": entry["threshold"],
            "infobatch/score_mean": entry["score_mean"],
            **{f"infobatch/{name}": entry.get(name) for name in FIGURES},
        }
        return {name: value for name, value in scalars.items() if value is not None}

    def summary(self, is_over: bool = False, **counts: Any) -> dict[str, Any]:
        """The books as plain numbers, ready for JSON.

        Args:
            is_over (bool): Whether to count the pass in hand as done, which the processes have yet to book together.
            counts: What the host counts itself, to stand before the passes.
        """
        settings = {"policy": self.policy.name, "prune_ratio": None, "delta": None, **self.policy.settings()}
        total = self.schedule.total_samples / self.schedule.num_samples
        return {
            **settings,
            **self.store.settings(),
            "num_samples": self.schedule.num_samples,
            "passes_done": self.pass_index + is_over,
            "passes_total": int(total) if total.is_integer() else total,
            "visits": self.visits,
            "visits_full": self.visits_full,
            "saved_ratio": self.saved_ratio,
            "visits_skipped": self.visits_skipped,
            "forward_visits": self.forward_visits,
            "nonfinite_losses": self.store.num_nonfinite,
            "unusable_visits": self.store.num_invalid,
            "unscored_samples": self.store.num_unscored,
            "seed": self.seed,
            **counts,
            "per_pass": [dict(entry) for entry in [*self.history, *([self._entry()] if is_over else [])]],
        }


def _figures(worth: Worth | None) -> dict[str, float | None]:
    """The figures of a worth by name; None where it is not known."""
    return dict.fromkeys(FIGURES) if worth is None else worth.plain()
