"""The pass machine of a pruned training: draws the plan of each pass, and hands its weights out."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from . import rng
from .blanks import blank_factor
from .devices import on_cpu
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

    def open_pass(self) -> int:
        return len(self.begin_pass())

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
        visits, batch = len(self.begin_pass()), self.schedule.batch_size
        nearest = (2 * visits * done + batch * of) // (2 * batch * of)
        # What is begun but not done has a batch left: better one twice than one never.
        return max(0, min(nearest, visits // batch - (done < of))) * batch

    def _set_plan(self, plan: Plan | None) -> None:
        self.plan = plan
        self._weights = None if plan is None else PlanWeights(plan, self.schedule.num_samples)


def _first(indices: Tensor, where: Tensor) -> int:
    return int(indices[where][0])
