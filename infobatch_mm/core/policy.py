"""What a pruning policy is: from what is known of the samples to the chances with which a pass visits them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .chances import Chances, Thinning
from .checks import plain
from .plan import Plan
from .worth import as_norms, enough, pass_worth, sampled_norms


@dataclass(frozen=True)
class Snapshot:
    """What is known of the samples when a pass is planned.

    Attributes:
        scores (Tensor): Score of every sample, shape ``(N,)``, float32, finite where seen, 0 elsewhere.
        seen (Tensor): Which samples have a score, shape ``(N,)``, bool.
        times_seen (Tensor): How often one was recorded, shape ``(N,)``, int32.
        progress (float): Share of the training that is done, in [0, 1).
        pass_index (int): Passes that are done. Defaults to 0.
        pass_share (float): Share of the training that a whole pass is, in (0, 1]. Defaults to 1.
        saved (float): Visits that were saved so far, as a share of the whole unpruned training's. Defaults to 0.
        columns (Mapping): What else the score keeps of each sample, by name, shape ``(N,)`` each; see
            :attr:`.ScoreRule.columns`. Defaults to none.
        norms_of (Callable): From scores to the norms of gradients that they stand for; see :meth:`.ScoreRule.norms`.
            Defaults to the scores themselves.
    """

    scores: Tensor
    seen: Tensor
    times_seen: Tensor
    progress: float
    pass_index: int = 0
    pass_share: float = 1.0
    saved: float = 0.0
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    norms_of: Callable[[np.ndarray], np.ndarray | None] = as_norms

    def norms(self) -> np.ndarray | None:
        """Root mean square norms of the gradients of enough samples for a mean, as far as scores tell.

        Returns:
            ndarray: Shape ``(n,)``, float, of the samples of :func:`.enough`; of ones without a score the mean of the
            others. None where scores say nothing of norms, or there is none.
        """
        return sampled_norms(self.scores.numpy(), self.seen.numpy(), self.norms_of)

    def some(self) -> Snapshot:
        """The same of enough samples for a mean."""
        where = enough(len(self.seen))
        if isinstance(where, slice):
            return self
        places = torch.from_numpy(where)
        return replace(
            self,
            scores=self.scores[places],
            seen=self.seen[places],
            times_seen=self.times_seen[places],
            columns={key: each[places] for key, each in self.columns.items()},
        )


class PruningPolicy(ABC):
    """Decides which samples a pass visits, with which chance.

    A policy is stateless: what it needs is passed in, so that every rank and every resumed run draws
    the same plan. It writes :meth:`chances`; the draw, exact counts, weights and annealing are done for it. One that
    draws by itself writes :meth:`draw` in its place.
    """

    #: Name under which users select the policy and checkpoints record it.
    name: str
    #: Whether it prunes nothing before samples have scores, hence nothing in a training of one pass.
    needs_scores: ClassVar[bool] = False
    #: Whether sums over its plans, by their weights, are those over the data in expectation.
    unbiased: ClassVar[bool] = True
    #: Name of the score that it goes by where the user names none; None for the last loss.
    score: ClassVar[str | None] = None
    #: ``'unbiased'`` for weights of 1/pi, ``'step'`` for the same divided by their mean over the plan, ``'none'`` for
    #: weights of one.
    rescale: str = "unbiased"
    #: Why a run may save less than its ``target_saving``, and what to do.
    why_less: ClassVar[str] = (
        "the policy could skip no more, as where too few samples are below the mean; raise delta, or take "
        "policy='variance'"
    )
    #: ``'batch'`` where a pruned pass makes fewer steps, ``'steps'`` where it makes as many on smaller batches.
    keep: str = "batch"
    #: By which power of their size the learning rates of smaller batches are multiplied; see :data:`.LR_RULES`.
    lr_rule: str = "none"

    @property
    def needs_norms(self) -> bool:
        """Whether it asks what passes are worth, for which scores have to tell norms of gradients."""
        return False

    @abstractmethod
    def is_active(self, progress: float) -> bool:
        """Whether passes that start at ``progress`` (share of the whole training, in [0, 1)) are pruned."""

    def check_length(self, pass_share: float, batch_share: float) -> None:
        """Refuse a training that is too short for the policy; see :meth:`.AnnealedPolicy.check_length`."""
        return None

    def chances(self, snapshot: Snapshot) -> Chances | Thinning | None:
        """With which chance a pass visits each sample.

        Args:
            snapshot (Snapshot): What is known of them. A policy that goes by scores never prunes samples without one.

        Returns:
            Chances | Thinning | None: A chance for each sample; or a mask and one ratio; None for a full pass.
        """
        raise NotImplementedError

    def plan(self, snapshot: Snapshot, generator: torch.Generator, multiple_of: int) -> Plan | None:
        """Draw the plan of one pass: :meth:`chances`, brought to full batches, or what :meth:`draw` makes of them.

        Args:
            snapshot (Snapshot): What is known of the samples.
            generator (torch.Generator): The only source of randomness.
            multiple_of (int): Number that the count of visits should be a multiple of, 1 for any.
        """
        if type(self).draw is not PruningPolicy.draw:
            return self.draw(snapshot.scores, snapshot.seen, generator, multiple_of)
        plan = self._drawn(snapshot, generator, multiple_of)
        if plan is not None and self.rescale == "step":
            return plan.with_mean_weight_one()
        return plan.unweighted() if plan is not None and self.rescale == "none" else plan

    def _drawn(self, snapshot: Snapshot, generator: torch.Generator, multiple_of: int) -> Plan | None:
        """A plan with the chances of :meth:`chances`, which are checked."""
        found = self.chances(snapshot)
        if found is None:
            return None
        if not isinstance(found, (Chances, Thinning)):
            fault: str | None = f"chances() returned a {type(found).__name__}, expected a Thinning, Chances or None"
        else:
            fault = found.fault(len(snapshot.seen))
        if fault is not None:
            raise ValueError(f"policy {self.name!r} ({type(self).__qualname__}) gave chances that cannot be: {fault}")
        plan = found.drawn(generator, multiple_of)
        if plan is None or (norms := snapshot.norms()) is None:
            return plan
        weighted = self.rescale != "none" and getattr(found, "weighted", True)
        return replace(plan, worth=pass_worth(norms, found.by_sample(enough(len(snapshot.seen))), weighted))

    def draw(self, scores: Tensor, seen: Tensor, generator: torch.Generator, multiple_of: int) -> Plan | None:
        """Draw the plan of one pass.

        Args:
            scores (Tensor): Last score of every sample, shape ``(N,)``, float32, finite where seen.
            seen (Tensor): Which samples have a score, shape ``(N,)``, bool. A policy that goes by
                scores never prunes the others.
            generator (torch.Generator): The only source of randomness.
            multiple_of (int): Number that the count of visits should be a multiple of, 1 for any.

        Returns:
            Plan | None: The plan in random order, or None where nothing can be pruned: the pass is then a full one.
        """
        return self._drawn(Snapshot(scores, seen, seen.to(torch.int32), progress=0.0), generator, multiple_of)

    def remark(self, limit: float | None) -> tuple[str, str] | None:
        """What it decides of the next pass, and why; None for policies that decide nothing.

        It is said before the pass, and again only where the decision is another.

        Args:
            limit (float, optional): Largest efficiency of any unbiased pruning by the scores so far; None where they do
                not tell.
        """
        return None

    def settings(self) -> dict[str, Any]:
        """What identifies the policy in checkpoints and summaries: its name and arguments, as plain values.

        A policy with arguments overrides this: what is left out is neither compared on resume nor written down where a
        host writes its config.
        """
        return {"policy": self.name}

    def __repr__(self) -> str:
        # The form that build_policy() takes: a host that writes its config down, with an instance in it, writes Python
        # that can be read again.
        arguments = {key: plain(value) for key, value in self.settings().items() if key != "policy"}
        return f"dict({', '.join(f'{key}={value!r}' for key, value in {'type': self.name, **arguments}.items())})"

    def __str__(self) -> str:
        # Which is what MMEngine writes: a dataclass has a __repr__ of its own.
        return PruningPolicy.__repr__(self)
