"""The state machine of a pruned training: scores, the plan in flight, the position in it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from . import rng
from .blanks import blank_factor
from .books import Books
from .devices import on_cpu
from .distributed import Group
from .plan import Plan, full_plan
from .plan_check import check_drawn
from .policy import PruningPolicy, Snapshot
from .policy_registry import is_ours
from .schedule import Schedule
from .state import PrunerState, check_fits, parse, state_of
from .store import ScoreStore
from .weights import PlanWeights


class Pruner(Books):
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
        fingerprint (str): As above, like ``shuffle`` and ``item_seed``.
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
        if seed < 0:
            raise ValueError(f"seed={seed} is negative: use 0 or a positive number")
        store = ScoreStore(schedule.num_samples, score_ema, score, group)
        super().__init__(schedule, policy, store, int(seed), group)
        self.shuffle = shuffle
        self.fingerprint = fingerprint
        self.item_seed = item_seed
        self._weights: PlanWeights | None = None

    def identity(self) -> dict[str, Any]:
        """What must be equal on all processes, by name: they draw the same plans from it."""
        return {
            "num_samples": self.schedule.num_samples,
            "fingerprint": self.fingerprint,
            "batch_size": self.schedule.batch_size,
            "seed": self.seed,
            "shuffle": bool(self.shuffle),
            "item_seed": bool(self.item_seed),
            **self.store.settings(),
            **self.policy.settings(),
            **self.schedule.settings(),
        }

    # ---- a pass -----------------------------------------------------------------------------------

    def begin_pass(self) -> Plan:
        """The plan of the current pass: the one in flight, else a new one drawn from the scores."""
        if self.plan is None:
            self.store.flush()
            generator = rng.generator(self.seed, self.pass_index)
            plan = None
            if self.is_active:
                known = self.store.values, self.store.seen, self.store.times_seen
                if not is_ours(self.policy):  # which may write into what it is given
                    known = tuple(each.clone() for each in known)
                snapshot = Snapshot(*known, self.schedule.progress(self.pass_index))
                plan = self.policy.plan(snapshot, generator, self.schedule.batch_size)
                check_drawn(plan, self.policy, self.schedule.num_samples, self.schedule.batch_size)
            if plan is None:
                plan = full_plan(self.schedule.num_samples, generator)
            # Cut first, sort then: what a pass leaves out is random also where its order is not.
            plan = self.schedule.fit(plan, self.pass_index)
            if plan.pruned and self.store.num_invalid:
                # Counted now, and kept with the plan: what its own visits find out must not change it midway.
                plan = replace(plan, blanks=self.store.blanks(plan.indices))
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
        looks, num_samples = on_cpu(indices), self.schedule.num_samples
        if looks and bool((outside := (indices < 0) | (indices >= num_samples)).any()):
            raise ValueError(
                f"sample index {_first(indices, outside)} is outside the data set of {num_samples} samples"
            )
        assert self._weights is not None
        weights = self._weights(indices)
        # A look at CPU memory costs nothing; on a device it would make the step wait.
        if looks and bool((weights == 0).any()):
            raise ValueError(
                f"sample index {_first(indices, weights == 0)} is not part of pass {self.pass_index + 1}: weigh each "
                "batch during the pass whose sampler handed it out"
            )
        return weights

    def blank_factor(self, batch: int) -> float:
        """What gradients of this pass are scaled by where losses are divided by the valid of a process's ``batch``."""
        plan = self.plan
        if plan is None or not plan.pruned:
            return 1.0
        return blank_factor(self.schedule.num_samples, plan.blanks[0], len(plan), plan.blanks[1], batch)

    def record(
        self, indices: Tensor, losses: Tensor, valid: Tensor | None = None, log_snr: Tensor | None = None
    ) -> None:
        """Take unweighted per-sample losses as scores; see :meth:`ScoreStore.record`."""
        self.store.record(indices, losses, valid, log_snr)

    @property
    def batches(self) -> int:
        """Iterations that walk the whole plan in flight."""
        return self.schedule.batches(self.begin_pass(), self.pass_index)

    @property
    def batches_done(self) -> int:
        """Iterations of the plan in flight that are done."""
        return min(self.batches, -(-self.visited // self.schedule.batch_size))

    def finish_pass(self, together: bool = True) -> dict[str, Any]:
        """Merge the scores over processes, book the pass, move on to the next.

        Args:
            together (bool): Whether to exchange anything, for which every process must call it; not where all
                processes know the same already.

        Returns:
            dict: The entry of :attr:`history`.
        """
        if together:
            self.merge()
        self.store.settle()
        entry = self._entry()
        self.history.append(entry)
        for key in self._booked:
            self._booked[key] += entry[key]
        self._set_plan(None)
        self.pass_index += 1
        self._stand_at_begin()
        return entry

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
        self._book([entry for entry in self.history if entry["pass"] < pass_index])
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

    # ---- state ------------------------------------------------------------------------------------

    def state_dict(self, plan: Plan | None = None) -> dict[str, Any]:
        """Everything that cannot be recomputed: plain tensors and numbers, no collectives.

        Call :meth:`merge` on all processes first; what is not merged is this process's alone
        and the state says so.

        Args:
            plan (Plan, optional): The plan in flight, where its visits were made in another order. Defaults to
                :attr:`plan`.
        """
        return state_of(self, plan or self.plan)

    def check_state(self, state: Any) -> PrunerState:
        """Read a state, and refuse one that belongs to another run.

        Args:
            state (Mapping | PrunerState): What :meth:`state_dict` gave, or this method.

        Returns:
            PrunerState: For :meth:`load_state_dict`, which then need not read it again.

        Raises:
            ValueError: With both values, for a newer version, another data set or policy, or a damaged state.
        """
        if isinstance(state, PrunerState):
            return state
        parsed = parse(state)
        check_fits(parsed, self)
        return parsed

    def load_state_dict(self, state: Mapping[str, Any] | PrunerState) -> bool:
        """Continue where :meth:`state_dict` was taken; see :meth:`check_state` for what is refused.

        Where a pass is of other batches than the one in flight was (another global batch size, another
        ``drop_last``, a partial last pass of another length), it is drawn again and the rest of it is visited;
        a schedule of iterations then needs :meth:`start_at` to find its place. Scores and books carry on.

        Returns:
            bool: Whether the pass in flight goes on as it was planned.
        """
        parsed = self.check_state(state)
        if parsed.unmerged:
            warnings.warn(
                "the InfoBatch state was saved before the scores of all processes were merged: it holds those of one "
                "process only",
                stacklevel=2,
            )
        self.store.load_state_dict(parsed.store)
        self.seed, self.pass_index = parsed.seed, parsed.pass_index
        self._set_plan(parsed.plan)
        self._stand_at_begin()
        self.visited, self._skipped, self._corrections = parsed.visited, parsed.skipped, {}
        self.visits_before, self.full_before = parsed.visits_before, parsed.full_before
        self._book([dict(entry) for entry in parsed.history])
        here = self.schedule.batch_size, self.schedule.plan_visits(self.pass_index)
        goes_on = (parsed.batch_size, parsed.pass_samples) == here
        self.schedule.take_over(parsed.schedule)
        if not goes_on:
            self.start_at(self.pass_index, *(0, 1) if self.plan is None else (self.visited, len(self.plan)))
        return goes_on

    def _set_plan(self, plan: Plan | None) -> None:
        self.plan = plan
        self._weights = None if plan is None else PlanWeights(plan, self.schedule.num_samples)


def _first(indices: Tensor, where: Tensor) -> int:
    return int(indices[where][0])
