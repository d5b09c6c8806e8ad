"""A training, pass by pass, whoever decides what a pass visits: scores, books, identity, state."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from .books import Books
from .distributed import Group
from .plan import Plan
from .policy import PruningPolicy
from .schedule import Schedule
from .score_rule import ScoreRule
from .state import PrunerState, check_fits, check_names, parse, state_of
from .store import ScoreStore


def score_of(
    policy: PruningPolicy, score: str | Mapping[str, Any] | ScoreRule | None, score_ema: float | None
) -> tuple[str | Mapping[str, Any] | ScoreRule | None, float | None]:
    """What the user says of the score, and the policy's own where the user names none."""
    return policy.score if score is None and not score_ema else score, score_ema


class Training(Books, ABC):
    """What a :class:`.Pruner`, which draws plans, and a :class:`.Watcher`, which follows a host, have in common.

    A pass goes: :meth:`open_pass`, then for each batch :meth:`weights`, :meth:`record` and :meth:`advance`, then
    :meth:`finish_pass`. Hosts differ only in who calls these.

    Args:
        schedule (Schedule): The host's training as passes over the data.
        policy (PruningPolicy): What to visit.
        seed (int): Seed of all draws, the same on every process. Defaults to 0.
        shuffle (bool): Whether passes are in random order. Defaults to True.
        fingerprint (str): Identifies the data set beyond its length; compared on resume.
        item_seed (bool): Whether samplers hand out a seed with each index, made of run, pass and position,
            so that augmentations repeat after a resume. Defaults to False.
        score_ema (float, optional): Decay of the average that is a sample's score; see :class:`.ScoreStore`.
        score (str | dict | ScoreRule, optional): What samples are ranked by; see :class:`.ScoreStore`. Defaults to
            the policy's own, which is their last loss for most.
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.

    Attributes:
        fingerprint (str): As above, like ``shuffle`` and ``item_seed``.

    Raises:
        ValueError: If the seed is negative, the score unknown, or none that the policy can go by.
    """

    #: Whether the host's own sampler says what is visited, and when.
    keeps_order: ClassVar[bool]

    def __init__(
        self,
        schedule: Schedule,
        policy: PruningPolicy,
        seed: int = 0,
        shuffle: bool = True,
        fingerprint: str = "",
        item_seed: bool = False,
        score_ema: float | None = None,
        score: str | Mapping[str, Any] | ScoreRule | None = None,
        group: Group = None,
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed={seed} is negative: use 0 or a positive number")
        score, score_ema = score_of(policy, score, score_ema)
        store = ScoreStore(schedule.num_samples, score_ema, score, group)
        super().__init__(schedule, policy, store, int(seed), group)
        self.shuffle = shuffle
        self.fingerprint = fingerprint
        self.item_seed = item_seed
        check_names(self)
        if policy.needs_norms and not store.rule.tells_norms:
            raise ValueError(
                f"policy {policy.name!r} goes by what passes are worth, which score={store.score!r} does not tell: it "
                "is no norm of a gradient; use score='gradient' or the loss ('raw'), or say how much by prune_ratio"
            )
        policy.check_length(
            min(1.0, schedule.num_samples / schedule.total_samples), schedule.batch_size / schedule.num_samples
        )

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

    @abstractmethod
    def open_pass(self) -> int:
        """Get ready for the current pass, or the rest of it; returns its visits, over all processes."""

    @abstractmethod
    def weights(self, indices: Tensor) -> Tensor:
        """Weights of visits of the pass in hand.

        Args:
            indices (Tensor): Sample indices, shape ``(B,)``, int64, on any device.

        Returns:
            Tensor: Shape ``(B,)``, float32, on the same device.
        """

    @property
    @abstractmethod
    def batches(self) -> int:
        """Iterations that walk the whole current pass."""

    @property
    def batches_done(self) -> int:
        """Iterations of the current pass that are done."""
        return min(self.batches, -(-self.visited // self.pass_batch))

    @property
    def pass_batch(self) -> int:
        """Visits of the current pass in a batch, over all processes."""
        return self.schedule.batch_size

    @property
    def scales_rates(self) -> bool:
        """Whether the policy gives smaller batches other learning rates."""
        return False

    def lr_factor(self, plan: Plan | None = None) -> float:
        """What learning rates of steps on the batches of a plan are multiplied by.

        Args:
            plan (Plan, optional): Defaults to the one in flight.

        Returns:
            float: In (0, 1]; 1 for batches of the host's own size.
        """
        return 1.0

    def record(
        self,
        indices: Tensor,
        losses: Tensor,
        valid: Tensor | None = None,
        log_snr: Tensor | None = None,
        evidence: Tensor | None = None,
    ) -> None:
        """Take unweighted per-sample losses as scores, or norms that are yet to come; see :class:`ScoreStore`."""
        if self.store.rule.takes_norms and valid is None:
            self.store.record_norms(indices, losses.detach())
        else:
            self.store.record(indices, losses, valid, log_snr, evidence)

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
            self.store.check_norms()
        self.store.settle()
        entry = self._entry()
        self.history.append(entry)
        for key in self._booked:
            self._booked[key] += entry[key]
        self._set_plan(None)
        self.pass_index += 1
        self._stand_at_begin()
        return entry

    def start_at(self, pass_index: int, done: int = 0, of: int = 1) -> None:
        """Go to a position of the schedule; a pass that is begun there is drawn again.

        The books are kept: :attr:`visits` and :attr:`visits_full` stay what they were.

        Args:
            pass_index (int): Passes that are done.
            done (int): Of the next one the share ``done / of`` counts as visited.
            of (int): At least 1.
        """
        seen, full = self.visits, self.visits_full
        self._set_plan(None)
        self.pass_index = pass_index
        self._stand_at_begin()
        self._book([entry for entry in self.history if entry["pass"] < pass_index])
        if done and not self.finished:
            self.visited = self._visits_at(done, of)
        self.visits_before += seen - self.visits
        self.full_before += full - self.visits_full

    @abstractmethod
    def _visits_at(self, done: int, of: int) -> int:
        """Visits of the current pass that the share ``done / of`` of it comes to."""

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
        ``drop_last``, a partial last pass of another length, processes that cannot share a smaller batch), it is drawn
        again and the rest of it is visited; a schedule of iterations then needs :meth:`start_at` to find its place.
        Scores and books carry on.

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
        self.last_pruned = -1
        self._set_plan(parsed.plan)
        self._stand_at_begin()
        self.visited, self._skipped, self._corrections = parsed.visited, parsed.skipped, {}
        self.visits_before, self.full_before = parsed.visits_before, parsed.full_before
        self.forward_visits = parsed.forward_visits
        self.last_pruned = max(parsed.last_pruned, self.last_pruned)
        self._book([dict(entry) for entry in parsed.history])
        here = self.schedule.batch_size, self.schedule.plan_visits(self.pass_index)
        goes_on = (parsed.batch_size, parsed.pass_samples) == here and self._fits(parsed.plan)
        self.schedule.take_over(parsed.schedule)
        if not goes_on:
            self.start_at(self.pass_index, *(0, 1) if self.plan is None else (self.visited, len(self.plan)))
        return goes_on

    def _fits(self, plan: Plan | None) -> bool:
        """Whether the batches of a plan can be shared out among the processes of this run."""
        return True

    def _set_plan(self, plan: Plan | None) -> None:
        self.plan = plan
