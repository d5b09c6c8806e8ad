"""The state machine of a pruned training: scores, the plan in flight, the position in it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import noise_levels, rng, unusable
from .blanks import blank_factor
from .devices import on_cpu
from .distributed import Group, gather, world_size
from .plan import Plan, full_plan
from .policies import PruningPolicy
from .policy_registry import check_drawn, is_ours
from .schedule import Schedule
from .scores import ScoreStore
from .weights import PlanWeights

#: 2 where scores are averages, 3 where they are by noise level, which the versions before do not know of.
STATE_VERSION = 3

#: What :meth:`Pruner.state_dict` holds, so that checking a state copies none.
_STATE_KEYS = (
    *("version", "num_samples", "fingerprint", "settings", "batch_size", "schedule", "seed"),
    *("scores", "seen", "times_seen", "num_nonfinite", "num_invalid", "unmerged"),
    *("pass_index", "visited", "visits_before", "full_before", "plan", "history"),
)
#: Of these, the numbers; none of them can be negative.
_COUNTS = (
    *("num_samples", "batch_size", "seed"),
    *("num_nonfinite", "num_invalid", "pass_index", "visited"),
)


class Pruner:
    """Draws the plan of each pass, hands out its weights, takes the scores, keeps the books.

    A pass goes: :meth:`begin_pass`, then for each batch :meth:`weights`, :meth:`record` and
    :meth:`advance`, then :meth:`finish_pass`. Hosts differ only in who calls these.

    Args:
        schedule (Schedule): The host's training as passes over the data.
        policy (PruningPolicy): What to visit.
        seed (int): Seed of all draws, the same on every process. Defaults to 0.
        shuffle (bool): Whether passes are in random order. Defaults to True.
        fingerprint (str): Identifies the data set beyond its length; compared on resume.
        item_seed (bool): Whether samplers hand out a seed with each index, made of run, pass and position,
            so that augmentations repeat after a resume. Defaults to False.
        score_ema (float, optional): Decay of the average that is a sample's score; see :class:`.ScoreStore`.
        score (str, optional): What samples are ranked by; see :class:`.ScoreStore`. Defaults to their last loss.
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.

    Attributes:
        store (ScoreStore): The scores.
        plan (Plan, optional): The plan in flight.
        pass_index (int): Number of finished passes.
        visited (int): Visits of the plan in flight that were handed out, over all processes: the position in it.
        own_skipped (int): Of these, visits that this process did not weigh, and has not told the others of.
        visits_before (int): Visits that no pass in :attr:`history` accounts for: those of a run that was not
            pruned so far, or of a pass that was drawn anew.
        full_before (int): What the unpruned run would have made in their place, as far as it differs from what
            the schedule says.
        group (ProcessGroup, optional): As above.
        history (list[dict]): One entry per finished pass: ``pass, kept, skipped, kept_ratio, threshold, score_mean``;
            ``kept`` counts visits that were weighed, ``skipped`` those that were only handed out.
    """

    def __init__(
        self,
        schedule: Schedule,
        policy: PruningPolicy,
        seed: int = 0,
        shuffle: bool = True,
        fingerprint: str = "",
        item_seed: bool = False,
        score_ema: float | None = None,
        score: str | None = None,
        group: Group = None,
    ) -> None:
        self.schedule = schedule
        self.policy = policy
        if seed < 0:
            raise ValueError(f"seed={seed} is negative: use 0 or a positive number")
        self.seed = int(seed)
        self.shuffle = shuffle
        self.fingerprint = fingerprint
        self.item_seed = item_seed
        self.store = ScoreStore(schedule.num_samples, score_ema, score, group)
        self.group = group
        self.plan: Plan | None = None
        self.pass_index = 0
        self.visited = 0
        self.own_skipped = 0
        self._skipped = 0  # what all processes know of
        self._corrections: dict[int, int] = {}
        self.visits_before = 0
        self.full_before = 0
        self.history: list[dict[str, Any]] = []
        self._weights: PlanWeights | None = None
        self._blank_factors: dict[int, float] = {}  # of the plan in flight

    # ---- a pass -----------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the whole schedule is done."""
        return self.pass_index >= self.schedule.num_passes

    @property
    def is_active(self) -> bool:
        """Whether the policy prunes the current pass."""
        return self.policy.is_active(self.schedule.progress(self.pass_index))

    def begin_pass(self) -> Plan:
        """The plan of the current pass: the one in flight, else a new one drawn from the scores."""
        if self.plan is None:
            self.store.flush()
            generator = rng.generator(self.seed, self.pass_index)
            plan = None
            if self.is_active:
                scores, seen = self.store.values, self.store.seen
                if not is_ours(self.policy):  # which may write into what it is given
                    scores, seen = scores.clone(), seen.clone()
                plan = self.policy.draw(scores, seen, generator, self.schedule.batch_size)
                check_drawn(plan, self.policy, self.schedule.num_samples, self.schedule.batch_size)
            if plan is None:
                plan = full_plan(self.schedule.num_samples, generator)
            # Cut first, sort then: what a pass leaves out is random also where its order is not.
            plan = self.schedule.fit(plan, self.pass_index)
            self._set_plan(plan if self.shuffle else plan.sorted())
        assert self.plan is not None
        return self.plan

    def weights(self, indices: Tensor) -> Tensor:
        """Weights of visits of the plan in flight.

        Args:
            indices (Tensor): Sample indices, shape ``(B,)``, int64, on any device.

        Returns:
            Tensor: Shape ``(B,)``, float32, on the same device.

        Raises:
            ValueError: If no pass is in flight or, for indices on the CPU, if one is not part of it.
        """
        if self.plan is None:
            raise ValueError("no pass is in flight: walk the loader before weighing a batch")
        looks = on_cpu(indices)
        num_samples = self.schedule.num_samples
        if looks and bool((outside := (indices < 0) | (indices >= num_samples)).any()):
            raise ValueError(
                f"sample index {_first(indices, outside)} is outside the data set of {num_samples} samples"
            )
        assert self._weights is not None
        weights = self._weights(indices)
        # A look at CPU memory costs nothing; on a device it would make the step wait.
        if looks and bool((weights == 0).any()):
            raise ValueError(
                f"sample index {_first(indices, weights == 0)} is not part of pass {self.pass_index}: weigh each "
                "batch during the pass whose sampler handed it out"
            )
        return weights

    def blank_factor(self, batch: int) -> float:
        """What gradients of the plan in flight are scaled by where losses are divided by the valid samples of a batch.

        Args:
            batch (int): Samples in a batch of this process.
        """
        if self.plan is None or not self.plan.pruned:
            return 1.0
        if batch not in self._blank_factors:
            blank = self.store.unusable.blank & ~self.store.seen
            visits = int(torch.count_nonzero(blank[self.plan.indices]))
            counts = self.schedule.num_samples, int(torch.count_nonzero(blank)), len(self.plan), visits
            self._blank_factors[batch] = blank_factor(*counts, batch)
        return self._blank_factors[batch]

    def record(
        self, indices: Tensor, losses: Tensor, valid: Tensor | None = None, log_snr: Tensor | None = None
    ) -> None:
        """Take unweighted per-sample losses as scores; see :meth:`ScoreStore.record`."""
        self.store.record(indices, losses, valid, log_snr)

    def advance(self, visits: int) -> None:
        """Count visits of the plan in flight, over all processes."""
        self.visited += visits

    @property
    def pass_done(self) -> bool:
        """Whether every visit of the plan in flight is done."""
        return self.plan is not None and self.visited >= len(self.plan)

    @property
    def batches(self) -> int:
        """Iterations that walk the whole plan in flight."""
        return self.schedule.batches(self.begin_pass(), self.pass_index)

    @property
    def batches_done(self) -> int:
        """Iterations of the plan in flight that are done."""
        return min(self.batches, -(-self.visited // self.schedule.batch_size))

    @property
    def skipped(self) -> int:
        """Visits of the plan in flight that were handed out and not weighed, as far as this process knows."""
        return self._skipped + self.own_skipped

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
                entry["kept"] += visits
                entry["skipped"] = max(0, entry.get("skipped", 0) - visits)
                entry["kept_ratio"] = self._kept_ratio(pass_index, entry["kept"])

    def finish_pass(self, together: bool = True) -> dict[str, Any]:
        """Merge the scores over processes, book the pass, move on to the next.

        Every process must call it. Returns the entry of :attr:`history`.

        Args:
            together (bool): Whether to exchange anything; not where all processes know the same already.
        """
        if together:
            self.merge()
        self.store.settle()
        entry = self._entry()
        self.history.append(entry)
        self._set_plan(None)
        self.pass_index += 1
        self._stand_at_begin()
        return entry

    def _entry(self) -> dict[str, Any]:
        """The books of the pass in hand, as if it was over."""
        kept = self._weighed
        return {
            "pass": self.pass_index,
            "kept": kept,
            "skipped": self.skipped,
            "kept_ratio": self._kept_ratio(self.pass_index, kept),
            "threshold": None if self.plan is None else self.plan.threshold,
            "score_mean": self.score_mean,
        }

    def _kept_ratio(self, pass_index: int, kept: int) -> float:
        return kept / max(1, self.schedule.full_visits(pass_index))

    @property
    def _weighed(self) -> int:
        """Visits of the pass in hand that were weighed; repeated ones, which round a full pass up, do not count."""
        return (self.visited if self.plan is None else min(self.visited, len(self.plan))) - self.skipped

    def _stand_at_begin(self) -> None:
        self.visited = self._skipped = self.own_skipped = 0

    def take_plan(self, plan: Plan) -> None:
        """Go on with the visits of the plan in flight in another order."""
        self._set_plan(plan)

    def reschedule(self, schedule: Schedule) -> None:
        """Take another schedule of the same kind, for what a host says only later.

        Where its batches differ, the pass in flight is drawn again and as much of it visited as was left.
        """
        differs = schedule.batch_size != self.schedule.batch_size
        self.schedule = schedule
        if differs and self.plan is not None:
            self.start_at(self.pass_index, self.visited, max(1, len(self.plan)))

    def start_at(self, pass_index: int, done: int = 0, of: int = 1) -> None:
        """Go to a position of the schedule; a pass that is begun there is drawn anew.

        The books are kept: :attr:`visits` and :attr:`visits_full` stay what they were.

        Args:
            pass_index (int): Passes that are done.
            done (int): Of the next one the share ``done / of`` counts as visited, brought to full batches.
            of (int): At least 1.
        """
        seen, full = self.visits, self.visits_full
        self._set_plan(None)
        self.pass_index = pass_index
        self._stand_at_begin()
        self.history = [entry for entry in self.history if entry["pass"] < pass_index]
        if done and not self.finished:
            visits, batch = len(self.begin_pass()), self.schedule.batch_size
            nearest = (2 * visits * done + batch * of) // (2 * batch * of)
            # What is begun but not done has a batch left: better one twice than one never.
            self.visited = max(0, min(nearest, visits // batch - (done < of))) * batch
        self.visits_before += seen - self.visits
        self.full_before += full - self.visits_full

    def observe(self, visits: int) -> None:
        """Count visits that a host makes by its own sampler, and book its passes."""
        visited = self.visited + visits
        while not self.finished and visited >= (whole := self.schedule.full_visits(self.pass_index)):
            self.visited = whole
            self.finish_pass()
            visited -= whole
        self.visited = visited

    # ---- books ------------------------------------------------------------------------------------

    @property
    def score_mean(self) -> float | None:
        """Mean score of the seen samples, None while there is none."""
        if not self.store.seen.any():
            return None
        return float(np.mean(self.store.values.numpy(), where=self.store.seen.numpy(), dtype=np.float64))

    @property
    def visits(self) -> int:
        """Visits made so far, over all processes: weighed ones."""
        return self.visits_before + sum(entry["kept"] for entry in self.history) + self.visited - self.skipped

    @property
    def unscored(self) -> int:
        """Samples that were visited and have no score, over all processes as far as this one knows."""
        return self.store.num_unscored

    @property
    def visits_skipped(self) -> int:
        """Visits that were handed out and not weighed, over all processes as far as this one knows."""
        return sum(entry.get("skipped", 0) for entry in self.history) + self.skipped

    @property
    def visits_full(self) -> int:
        """Visits that the unpruned run would have made at the same progress."""
        full = self.full_before + sum(self.schedule.full_visits(p) for p in range(self.pass_index))
        if self.plan is None:
            return full + self.visited
        return full + self.schedule.full_visits(self.pass_index) * self.visited // max(1, len(self.plan))

    @property
    def saved_ratio(self) -> float:
        """Share of visits avoided so far, in [0, 1). One that was handed out was not avoided, weighed or not."""
        handed_out = self.visits + self.visits_skipped
        return 1 - handed_out / self.visits_full if self.visits_full else 0.0

    def scalars(self) -> dict[str, float]:
        """What a host logs of the last finished pass, those that there are; empty before there is one."""
        if not self.history:
            return {}
        entry = self.history[-1]
        scalars = {
            "infobatch/kept_ratio": entry["kept_ratio"],
            "infobatch/saved_ratio": self.saved_ratio,
            "infobatch/threshold": entry["threshold"],
            "infobatch/score_mean": entry["score_mean"],
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
            "score": self.store.score,
            "score_ema": self.store.score_ema,
            "num_samples": self.schedule.num_samples,
            "passes_done": self.pass_index + is_over,
            "passes_total": int(total) if total.is_integer() else total,
            "visits": self.visits,
            "visits_full": self.visits_full,
            "saved_ratio": self.saved_ratio,
            "visits_skipped": self.visits_skipped,
            "nonfinite_losses": self.store.num_nonfinite,
            "unusable_visits": self.store.num_invalid,
            "unscored_samples": self.store.num_unscored,
            "seed": self.seed,
            **counts,
            "per_pass": [dict(entry) for entry in [*self.history, *([self._entry()] if is_over else [])]],
        }

    # ---- state ------------------------------------------------------------------------------------

    def state_dict(self, plan: Plan | None = None) -> dict[str, Any]:
        """Everything that cannot be recomputed: plain tensors and numbers, no collectives.

        Call :meth:`merge` on all processes first; what is not merged is this process's alone
        and the state says so.

        Args:
            plan (Plan, optional): The plan in flight, where its visits were made in another order. Defaults to
                :attr:`plan`.
        """
        plan = plan or self.plan
        return {
            "version": 3 if self.store.score == "timestep" else 2 if self.store.score_ema else 1,
            "num_samples": self.schedule.num_samples,
            "fingerprint": self.fingerprint,
            "settings": self.policy.settings(),
            "score": self.store.score,
            "score_ema": self.store.score_ema,
            "batch_size": self.schedule.batch_size,
            "schedule": {**self.schedule.settings(), "pass_samples": self.schedule.plan_visits(self.pass_index)},
            "seed": self.seed,
            **self.store.state_dict(),
            "pass_index": self.pass_index,
            "visited": self.visited,
            "skipped": self.skipped,
            "visits_before": self.visits_before,
            "full_before": self.full_before,
            "plan": None
            if plan is None
            else {
                "indices": plan.indices,
                "weights": plan.weights,
                "pruned": plan.pruned,
                "threshold": plan.threshold,
            },
            "history": [dict(entry) for entry in self.history],
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that belongs to another run.

        Raises:
            ValueError: With both values, for a newer version, another data set or another policy, or if
                the state is damaged.
        """
        if not isinstance(state, Mapping):
            raise damaged(type(state).__name__)
        version = state.get("version")
        if not isinstance(version, int) or version > STATE_VERSION:
            raise ValueError(
                f"cannot resume: the checkpoint's InfoBatch state has version {version!r}, this package reads "
                f"versions up to {STATE_VERSION}; update infobatch_mm"
            )
        for key in _STATE_KEYS:
            if key not in state:
                raise damaged(key)
        for key in _COUNTS:
            if not isinstance(state[key], int) or state[key] < 0:
                raise damaged(key)
        for key in ("settings", "schedule"):
            if not isinstance(state[key], Mapping):
                raise damaged(key)
        if (loop := state["schedule"].get("loop")) != self.schedule.loop:
            raise ValueError(
                f"cannot resume: the checkpoint was trained by {loop}, this run trains by {self.schedule.loop}; use "
                "the same kind of loop, or start a new run from its weights with load_from"
            )
        if state["num_samples"] != self.schedule.num_samples:
            raise ValueError(
                f"cannot resume: the checkpoint scores {state['num_samples']} samples, this data set has "
                f"{self.schedule.num_samples}; resume with the data set it was trained on"
            )
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                "cannot resume: the checkpoint scores a data set with other sample names (fingerprint "
                f"{state['fingerprint']!r}, this data set has {self.fingerprint!r}); resume with the data set it was "
                "trained on"
            )
        # States of earlier versions have no average, or one of losses only.
        average = state.get("score_ema", 0.0)
        score = state.get("score", "ema" if average else "raw")
        before = {**state["settings"], "score": score, "score_ema": average}
        settings = {**self.policy.settings(), "score": self.store.score, "score_ema": self.store.score_ema}
        if before != settings:
            raise ValueError(
                f"cannot resume: the checkpoint was pruned with {before}, this run has {settings}; "
                "use the same settings, or start a new run from its weights with load_from"
            )
        for key, dtype in (("scores", torch.float32), ("seen", torch.bool), ("times_seen", torch.int32)):
            tensor = state[key]
            if not isinstance(tensor, Tensor) or tensor.shape != (self.schedule.num_samples,) or tensor.dtype != dtype:
                raise damaged(key)
        if not bool(torch.isfinite(state["scores"]).all()):
            raise damaged("scores")
        if "unusable" in state and not unusable.fits(state["unusable"], self.schedule.num_samples):
            raise damaged("unusable")
        if score == "timestep" and not noise_levels.fits(state.get("noise_levels"), self.schedule.num_samples):
            raise damaged("noise_levels")
        if state["plan"] is not None:
            _check_plan(state["plan"], self.schedule.num_samples)
        if not isinstance(state["history"], list) or len(state["history"]) > state["pass_index"]:
            raise damaged("history")

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Continue where :meth:`state_dict` was taken; see :meth:`check_state` for what is refused.

        Where a pass is of other batches than the one in flight was (another global batch size, another
        ``drop_last``, a partial last pass of another length), it is drawn anew and the rest of it is visited;
        a schedule of iterations then needs :meth:`start_at` to find its place. Scores and books carry on.

        Returns:
            bool: Whether the pass in flight goes on as it was planned.
        """
        self.check_state(state)
        if state["unmerged"]:
            warnings.warn(
                "the InfoBatch state was saved before the scores of all processes were merged: it holds those of one "
                "process only",
                stacklevel=2,
            )
        self.store.load_state_dict(state)
        self.seed = int(state["seed"])
        self.pass_index = int(state["pass_index"])
        plan = state["plan"]
        self._set_plan(
            None
            if plan is None
            else Plan(plan["indices"].cpu(), plan["weights"].cpu(), bool(plan["pruned"]), plan["threshold"])
        )
        self._stand_at_begin()
        self.visited, self._skipped = int(state["visited"]), int(state.get("skipped", 0))
        self._corrections = {}
        self.visits_before = int(state["visits_before"])
        self.full_before = int(state["full_before"])
        self.history = [dict(entry) for entry in state["history"]]
        goes_on = (state["batch_size"], state["schedule"].get("pass_samples")) == (
            self.schedule.batch_size,
            self.schedule.plan_visits(self.pass_index),
        )
        self.schedule.take_over(state["schedule"])
        if not goes_on:
            self.start_at(self.pass_index, *(0, 1) if self.plan is None else (self.visited, len(self.plan)))
        return goes_on

    # ---- internals --------------------------------------------------------------------------------

    def _set_plan(self, plan: Plan | None) -> None:
        self.plan, self._blank_factors = plan, {}
        self._weights = None if plan is None else PlanWeights(plan, self.schedule.num_samples)


def _first(indices: Tensor, where: Tensor) -> int:
    return int(indices[where][0])


def damaged(key: str) -> ValueError:
    """The refusal of a state in which an entry is missing or makes no sense."""
    return ValueError(f"cannot resume: the checkpoint's InfoBatch state is damaged at {key!r}; use another checkpoint")


def _check_plan(plan: Any, num_samples: int) -> None:
    indices, weights = (plan.get(key) if isinstance(plan, Mapping) else None for key in ("indices", "weights"))
    if (
        not isinstance(indices, Tensor)
        or not isinstance(weights, Tensor)
        or indices.dim() != 1
        or indices.shape != weights.shape
        or indices.dtype != torch.int64
        or bool(((indices < 0) | (indices >= num_samples)).any())
        or not {"pruned", "threshold"} <= set(plan)
        # every sample at most once, and none that weighs nothing
        or len(indices)
        != torch.zeros(num_samples, dtype=torch.bool, device="cpu").index_fill_(0, indices.cpu(), True).sum()
        or not bool(((weights > 0) & torch.isfinite(weights)).all())
    ):
        raise damaged("plan")
