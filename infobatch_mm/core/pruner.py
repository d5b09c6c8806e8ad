"""The pass machine of a pruned training: draws the plan of each pass, and hands its weights out."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from . import rng
from .blanks import blank_factor
from .devices import on_cpu
from .distributed import world_size
from .lr_factor import lr_factor
from .plan import Plan, full_plan
from .plan_check import check_drawn
from .policy import Snapshot
from .policy_registry import is_ours
from .schedule import Schedule
from .training import Training
from .weights import PlanWeights


class Pruner(Training):
    """Draws the plan of each pass and hands out its weights; see :class:`.Training` for the rest and its arguments."""

    keeps_order = False

    _weights: PlanWeights | None = None
    _unit: int | None = None  # what a smaller batch is a multiple of

    def open_pass(self) -> int:
        return len(self.begin_pass())

    def begin_pass(self) -> Plan:
        """The plan of the current pass: the one in flight, else a new one drawn from the scores."""
        if self.plan is None:
            self.store.flush()
            generator = rng.generator(self.seed, self.pass_index)
            plan = None
            if self.is_active:
                known: tuple[Tensor, ...] = self.store.values, self.store.seen, self.store.times_seen
                if not is_ours(self.policy):  # which may write into what it is given
                    known = tuple(each.clone() for each in known)
                plan = self.policy.plan(self._snapshot(known), generator, self._multiple)
                check_drawn(plan, self.policy, self.schedule.num_samples, self._multiple)
            if plan is None:
                plan = replace(full_plan(self.schedule.num_samples, generator), worth=self.full_worth)
            elif self._keeps_steps and plan.pruned:
                plan = replace(plan, batch_size=self._smaller_batch(len(plan)))
            # Cut first, sort then: what a pass leaves out is random also where its order is not.
            plan = self.schedule.fit(plan, self.pass_index)
            if plan.pruned and self.store.num_invalid:
                # Counted now, and kept with the plan: what its own visits find out must not change it midway.
                plan = replace(plan, blanks=self.store.blanks(plan.indices))
            if plan.worth is not None:
                share = min(1.0, len(plan) / max(1, self.schedule.full_visits(self.pass_index)))
                # A policy that draws by itself does not know what the scores tell.
                plan = replace(plan, worth=plan.worth.paying(share) if self.store.rule.tells_norms else None)
            self._set_plan(plan if self.shuffle else plan.sorted())
        assert self.plan is not None
        return self.plan

    def _snapshot(self, known: tuple[Tensor, ...]) -> Snapshot:
        """What the policy is told, with these scores, seen mask and counts."""
        schedule = self.schedule
        whole = schedule.full_visits_before(schedule.num_passes)
        scores, seen, times_seen = known
        return Snapshot(
            scores,
            seen,
            times_seen,
            progress=schedule.progress(self.pass_index),
            pass_index=self.pass_index,
            pass_share=min(1.0, schedule.num_samples / schedule.total_samples),
            saved=(self.visits_full - self.visits - self.visits_skipped) / whole,
            columns=self.store.rule.columns,
            norms_of=self.store.rule.norms,
        )

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

    # ---- smaller batches ----------------------------------------------------------------------------

    def share_batches(self, unit: int) -> None:
        """Say what batches are shared out among; a policy that keeps the steps then makes them multiples of it.

        Called by a host that knows its batches, before it trains.

        Args:
            unit (int): Processes, times the parts in which each walks its share of a global batch.

        Raises:
            ValueError: If no smaller batch is possible, or none small enough for what the policy is to save.
        """
        if not self._keeps_steps:
            return
        schedule = self.schedule
        if schedule.batch_size < 2 * unit:
            raise ValueError(
                f"keep='steps' makes batches of pruned passes smaller, in multiples of {unit} (a sample for each "
                f"process), and the global batch_size={schedule.batch_size} is the smallest: give each process 2 "
                "samples or more (8 for savings in steps of an eighth), or use keep='batch'"
            )
        self._unit = unit
        self.policy.check_length(
            min(1.0, schedule.num_samples / schedule.total_samples), self._multiple / schedule.num_samples
        )
        if self.plan is not None and not self._fits(self.plan):
            self.start_at(self.pass_index, self.visited, max(1, len(self.plan)))

    @property
    def pass_batch(self) -> int:
        return (None if self.plan is None else self.plan.batch_size) or self.schedule.batch_size

    @property
    def scales_rates(self) -> bool:
        return self._keeps_steps and self.policy.lr_rule != "none"

    def lr_factor(self, plan: Plan | None = None) -> float:
        plan = self.plan if plan is None else plan
        if plan is None or plan.batch_size is None:
            return 1.0
        return lr_factor(self.policy.lr_rule, plan.batch_size / self.schedule.batch_size)

    @property
    def _keeps_steps(self) -> bool:
        return self.policy.keep == "steps"

    @property
    def _multiple(self) -> int:
        """What the number of visits of a pruned pass is a multiple of."""
        if not self._keeps_steps:
            return self.schedule.batch_size
        return self.schedule.whole_batches * (self._unit or world_size(self.group))

    def _smaller_batch(self, visits: int) -> int:
        """Batch with which so many visits make the steps of a full pass.

        Of an iteration loop, a pruned pass may hold more than the full batches of one: the rest is left out.
        """
        return min(visits // self.schedule.whole_batches, self.schedule.batch_size)

    def _fits(self, plan: Plan | None) -> bool:
        return plan is None or not (plan.batch_size or 0) % (self._unit or world_size(self.group))

    def blank_factor(self, batch: int) -> float:
        """What gradients of this pass are scaled by where losses are divided by the valid of a process's ``batch``."""
        plan = self.plan
        if plan is None or not plan.pruned:
            return 1.0
        return blank_factor(self.schedule.num_samples, plan.blanks[0], len(plan), plan.blanks[1], batch)

    @property
    def batches(self) -> int:
        """Iterations that walk the whole plan in flight."""
        return self.schedule.batches(self.begin_pass(), self.pass_index)

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

    def _visits_at(self, done: int, of: int) -> int:
        visits, batch = len(self.begin_pass()), self.pass_batch
        nearest = (2 * visits * done + batch * of) // (2 * batch * of)
        # What is begun but not done has a batch left: better one twice than one never.
        return max(0, min(nearest, visits // batch - (done < of))) * batch

    def _set_plan(self, plan: Plan | None) -> None:
        self.plan = plan
        if plan is not None and plan.pruned:
            self.last_pruned = self.pass_index
        self._weights = None if plan is None else PlanWeights(plan, self.schedule.num_samples)


def _first(indices: Tensor, where: Tensor) -> int:
    return int(indices[where][0])
