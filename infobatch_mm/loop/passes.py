"""The passes of one training: which walk belongs to which, and what became of its visits."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from ..core.devices import on_cpu
from ..core.distributed import gather, rank, world_size
from ..core.followed_rates import FollowedRates
from ..core.meeting import Meeting
from ..core.pruner import Pruner
from ..core.sample_norms import SampleNorms
from .looks import Looks, one_loss_each
from .notices import LoopNotices
from .sizes import Sizes
from .walk import Walk


class Passes:
    """Begins walks, takes down what was weighed in them, and ends passes.

    Each walk is a new pass, unless nothing was weighed in the last one. Processes meet where a pass ends, which is
    where the iterator of our loader is exhausted, or where the next walk begins, and in :meth:`merge`; nowhere else.

    Args:
        pruner (Pruner): Draws the plans, keeps the books.
        sizes (Sizes): Of its batches.

    Attributes:
        pruner (Pruner): As above.
        sizes (Sizes): As above.
        world (int): Number of processes that share the data.
        walk (Walk, optional): The walk begun last.
        is_resumed (bool): Whether a state was loaded.
        schedulers (WeakSet[ProgressScheduler]): What is to be told of each pass that begins.
        rates (FollowedRates): Learning rates of the steps on smaller batches.
    """

    def __init__(self, pruner: Pruner, sizes: Sizes) -> None:
        self.pruner, self.sizes = pruner, sizes
        self.world = sizes.world
        self.walk: Walk | None = None
        self._before: Walk | None = None  # the walk before, while something that it delivered waits to be weighed
        self._late: list[tuple[Walk, Looks, bool]] = []
        self._latest: tuple[Tensor, Tensor, SampleNorms] | None = None  # norms that the coming backward pass fills in
        self._late_norms: tuple[Tensor, Tensor, SampleNorms] | None = None
        self._skipped_before = 0  # on this process, in the pass in hand, before the walk in hand
        self._notices = LoopNotices()
        self.is_resumed = False
        self._meeting = Meeting(pruner.group)
        self.schedulers: WeakSet[Any] = WeakSet()  # one that was replaced is not to go on stepping
        by_name = "name it by infobatch.follow(optimizer), or hand its scheduler to infobatch.schedule()"
        self.rates = FollowedRates(pruner, f"{by_name}, before the first step")

    # ---- walks ----------------------------------------------------------------------------------------

    def begin(self, batch: int | None = None, drop_last: bool = False, in_order: bool = True) -> Walk:
        """Begin a walk: of a new pass, unless nothing was weighed in the last one.

        Args:
            batch (int, optional): As for :class:`.Walk`, like the others, in a full pass.
            drop_last (bool): As for :class:`.Walk`.
            in_order (bool): As for :class:`.Walk`.

        Raises:
            ValueError: If there are more or fewer processes than before, or a loader of the user's makes batches that
                are to become smaller.
        """
        if batch is None and self.pruner.policy.keep == "steps":
            raise ValueError(
                "keep='steps' makes the batches of pruned passes smaller, and a DataLoader of your own keeps its "
                "batch_size: walk infobatch.loader(dataset, batch_size) in its place, or use keep='batch'"
            )
        if (now := world_size(self.pruner.group)) != self.world:
            raise ValueError(
                f"this InfoBatch was made for {self.world} processes, but there are {now} now: make it after "
                "init_process_group, or after Accelerator()"
            )
        last, pruner = self.walk, self.pruner
        self._take_down()
        self._notices.begin()
        if last is not None and not last.finished:
            if self.is_amid:
                self.locate()
                self._skipped_before = pruner.own_skipped
                pruner.take_plan(last.rearranged())
            elif last.touched or last.has_nothing_to_weigh:
                self.finish()
            else:
                pruner.visited = min(last.start * self.world, len(last.plan))
                self._notices.idle(last)
        self._leave()
        if pruner.finished:
            self._notices.beyond_the_end(pruner)
        plan, num_samples = pruner.begin_pass(), pruner.schedule.num_samples
        where = (pruner.pass_index, rank(pruner.group), self.world, pruner.visited)
        batch = None if batch is None else self.sizes.in_pass(batch)
        self.walk = Walk(plan, num_samples, *where, batch, drop_last, in_order)
        self._settle_late()  # only now: on no process may they change the plan
        for scheduler in self.schedulers:
            scheduler.begin_pass(min(pruner.pass_index, pruner.schedule.num_passes), last)
        return self.walk

    @property
    def is_new(self) -> bool:
        """Whether nothing was walked, nor a state loaded."""
        return self.walk is None and self.pruner.pass_index == 0 and self.pruner.visited == 0

    @property
    def is_amid(self) -> bool:
        """Whether an iterator of our loader is in the midst of a walk: another one may only look, or takes it over."""
        walk = self.walk
        return walk is not None and walk.alive and walk.touched and not walk.finished and not walk.is_handed_out

    def end(self, walk: Walk) -> None:
        """The iterator of a walk is exhausted: its pass is over, if anything was weighed.

        The rest of a resumed pass is over in any case: where its batches are always skipped, no pass would follow.
        """
        if walk is self.walk and (walk.touched or walk.start > 0) and not walk.finished:
            self.finish()

    def forget(self) -> None:
        """Leave the walk in hand, and what was weighed in it, for a state that is being loaded."""
        self._leave()
        self.is_resumed = True
        self._before = None
        self._late = []
        self._skipped_before = 0

    def _leave(self) -> None:
        if self.walk is not None:
            self.walk.stale = True
            self._before = self.walk if self.walk.finished and self.walk.outstanding else None
            self.walk = None

    # ---- weighing -------------------------------------------------------------------------------------

    def walk_of(self, index: Tensor) -> Walk:
        """The walk that handed a batch out: loops that fetch one ahead weigh the last batch of a pass in the next.

        Raises:
            ValueError: If there was no walk yet.
        """
        walk, before = self.walk, self._before
        if walk is None:
            raise ValueError(
                "no pass is in flight: weigh the batches of infobatch.loader(), or of a DataLoader that was given "
                "sampler=infobatch.sampler in the place of shuffle=True"
            )
        if before is not None and on_cpu(index) and not walk.holds(index) and before.holds(index):
            return before
        return walk

    def add(
        self, walk: Walk, index: Tensor, losses: Tensor, level: Tensor | None, norms: SampleNorms | None = None
    ) -> None:
        """Keep the losses of a call, or the norms that are yet to come; they are taken down where nothing waits."""
        self.rates.weighed(self.pruner.lr_factor(walk.plan))
        self._notices.weighed()
        walk.pending.make_room()  # first: norms of gradients that are kept last are filled in later
        if walk.pending.is_due:
            self._take_down()
        self._take_late_norms()
        walk.add(index, losses, level)
        self._latest = None if norms is None else (index, losses, norms)

    def _take_late_norms(self) -> None:
        """Record the norms of a batch that was taken down between its weighing and its backward pass."""
        late, self._late_norms = self._late_norms, None
        if late is not None and late[2].is_known:
            index, norms, _ = late
            self.pruner.store.num_without_norm -= len(index)  # as which they were counted
            self.pruner.record(index.cpu(), norms.cpu())

    def _take_down(self) -> None:
        """Take down what was weighed: which visits were made, and the scores they give."""
        if self._latest is not None and not self._latest[2].is_known:
            self._late_norms = self._latest
        self._latest = None
        for walk in (self._before, self.walk):
            taken = None if walk is None else walk.take_looks()
            if walk is None or taken is None:
                continue
            if walk.finished and self.world > 1:
                self._late.append((walk, *taken))
            else:
                self._record(walk, *taken)

    def _settle_late(self) -> None:
        """Take down what was weighed after its pass had ended, as loops do that fetch one batch ahead."""
        late, self._late = self._late, []
        for each in late:
            self._record(*each)

    def _record(self, walk: Walk, looks: Looks, filled: bool) -> None:
        pruner = self.pruner
        # A look without a backward pass is none, where norms are what counts.
        missing = (looks.losses < 0).numpy() if pruner.store.rule.takes_norms else None
        samples, counting = one_loss_each(looks, average=not pruner.store.rule.defers, missing=missing)
        fresh = walk.take_down(samples, filled)
        if not fresh.all():
            counting = counting.at(np.isin(counting.index, samples[fresh]))
        pruner.record(torch.from_numpy(counting.index), counting.losses, evidence=counting.level)
        if walk.finished:
            pruner.correct(walk.pass_index, int(fresh.sum()))
            self._notices.again(walk, int((~fresh).sum()))

    # ---- books ----------------------------------------------------------------------------------------

    def locate(self) -> bool:
        """Bring the books up to date.

        Returns:
            bool: Whether the pass in flight is over but not booked, as several processes leave it until they meet.
        """
        self._take_down()
        walk, pruner = self.walk, self.pruner
        if walk is None or walk.finished:
            return False
        pruner.visited = min(walk.done * self.world, len(walk.plan))
        pruner.own_skipped = self._skipped_before + walk.handed_out(walk.done) - walk.weighed
        # Our loader ends its walks itself; until then it keeps its length.
        if walk.is_over and walk.batch is None and self.world == 1:
            self.finish()
            return False
        return walk.is_over

    def finish(self) -> None:
        """Exchange what the processes know and book the pass; every process must call it.

        Raises:
            ValueError: On every process, if they end different passes.
        """
        walk, pruner = self.walk, self.pruner
        assert walk is not None
        self._take_down()
        self._settle_late()
        handed_out = walk.handed_out()
        start = min(walk.start * self.world, len(walk.plan))
        pruner.own_skipped = self._skipped_before + handed_out - walk.weighed
        passes, counts = zip(*gather((pruner.pass_index, handed_out), pruner.group), strict=True)
        if len(set(passes)) > 1:
            raise ValueError(
                f"the processes end different passes, {min(passes) + 1} and {max(passes) + 1}: each must walk the "
                "loader as often as the others, and weigh something in every walk or in none"
            )
        pruner.visited = min(start + sum(counts), len(walk.plan))
        entry = pruner.finish_pass()
        if pruner.finished:
            self.rates.training_over()
        walk.finished = True
        self._skipped_before = 0
        if rank(pruner.group) == 0:
            self._notices.pass_done(pruner, entry, has_our_loader=walk.batch is not None)

    def merge(self, timeout_s: float) -> None:
        """Exchange what the processes know; every process must call it. A pass that is over is booked.

        Args:
            timeout_s (float): Seconds to wait for the other processes.
        """
        is_over = self.locate()
        if self.world == 1:
            return
        self._meeting.wait("infobatch.merge()", timeout_s)
        if all(gather(is_over, self.pruner.group)):
            self.finish()
            return
        self._settle_late()
        told = self.pruner.own_skipped
        self.pruner.merge()
        self._skipped_before -= told

    def share(self) -> int:
        """Visits of this process in the whole pass that is being walked or about to be."""
        self.locate()
        return -(-len(self.pruner.begin_pass()) // self.world)

    def seeds(self, walk: Walk) -> tuple[int, int] | None:
        """What seeds the items of a walk, if anything does."""
        return (self.pruner.seed, walk.pass_index) if self.pruner.item_seed else None
