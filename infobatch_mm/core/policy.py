"""What a pruning policy is: from what is known of the samples to the chances with which a pass visits them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import is_number, plain, what_is_wrong
from .plan import Plan, thinned_plan


@dataclass(frozen=True)
class Snapshot:
    """What is known of the samples when a pass is planned.

    Attributes:
        scores (Tensor): Score of every sample, shape ``(N,)``, float32, finite where seen, 0 elsewhere.
        seen (Tensor): Which samples have a score, shape ``(N,)``, bool.
        times_seen (Tensor): How often one was recorded, shape ``(N,)``, int32.
        progress (float): Share of the training that is done, in [0, 1).
    """

    scores: Tensor
    seen: Tensor
    times_seen: Tensor
    progress: float


@dataclass(frozen=True)
class Thinning:
    """A mask and a ratio: the common case of chances.

    Attributes:
        candidates (Tensor): Samples that are skipped with chance ``ratio``, shape ``(N,)``, bool; the others are
            visited for certain.
        ratio (float): In [0, 1).
        threshold (float, optional): Score below which a sample is a candidate, for the log.
    """

    candidates: Tensor
    ratio: float
    threshold: float | None = None

    def drawn(self, generator: torch.Generator, multiple_of: int) -> Plan | None:
        """A plan with these chances, as near as full batches allow; None where it would leave nothing out.

        The number of kept candidates is brought to where the visits make full batches, but no further than that a
        weight stays within twice the nominal 1/(1-r).
        """
        num_candidates = int(torch.count_nonzero(self.candidates))
        num_others = self.candidates.numel() - num_candidates
        num_kept = kept_count(num_candidates, num_others, self.ratio, multiple_of)
        if num_kept == num_candidates:
            return None
        return thinned_plan(self.candidates, num_kept, generator, threshold=self.threshold)


class PruningPolicy(ABC):
    """Decides which samples a pass visits, with which chance.

    A policy is stateless: what it needs is passed in, so that every rank and every resumed run draws
    the same plan. It writes :meth:`chances`; the draw, exact counts, weights and annealing are done for it. One that
    draws by itself writes :meth:`draw` in its place.
    """

    #: Name under which users select the policy and checkpoints record it.
    name: str
    #: Whether it prunes nothing before samples have scores, hence nothing in a training of one pass.
    needs_scores = False

    @abstractmethod
    def is_active(self, progress: float) -> bool:
        """Whether passes that start at ``progress`` (share of the whole training, in [0, 1)) are pruned."""

    def chances(self, snapshot: Snapshot) -> Thinning | None:
        """With which chance a pass visits each sample.

        Args:
            snapshot (Snapshot): What is known of them. A policy that goes by scores never prunes samples without one.

        Returns:
            Thinning | None: None for a full pass.
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
        return self._drawn(snapshot, generator, multiple_of)

    def _drawn(self, snapshot: Snapshot, generator: torch.Generator, multiple_of: int) -> Plan | None:
        """A plan with the chances of :meth:`chances`, which are checked."""
        found = self.chances(snapshot)
        if found is None:
            return None
        if (fault := _fault(found, len(snapshot.seen))) is not None:
            raise ValueError(f"policy {self.name!r} ({type(self).__qualname__}) gave chances that cannot be: {fault}")
        return found.drawn(generator, multiple_of)

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


def _fault(found: Any, num_samples: int) -> str | None:
    """What is wrong with chances; None for nothing."""
    if not isinstance(found, Thinning):
        return f"chances() returned a {type(found).__name__}, expected a Thinning or None"
    mask, ratio = found.candidates, plain(found.ratio)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (num_samples,):
        what = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        return f"candidates are {what}, expected a bool tensor of shape ({num_samples},)"
    if not is_number(ratio) or not 0 <= ratio < 1:
        return f"ratio={found.ratio!r}, expected a number in [0, 1)"
    return None


class AnnealedPolicy(PruningPolicy):
    """What policies share that prune with a ratio r until the share δ of the training is done.

    Args:
        prune_ratio (float): Chance r that a candidate is skipped, in [0, 1). Defaults to 0.5.
        delta (float): Share of the training after which pruning stops, in (0, 1]. Defaults to 0.875.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, prune_ratio: float = 0.5, delta: float = 0.875) -> None:
        check_ratio(prune_ratio)
        check_delta(delta)
        self.prune_ratio = float(prune_ratio)
        self.delta = float(delta)

    def is_active(self, progress: float) -> bool:
        # The tolerance keeps 0.7 * 10 passes at seven: binary fractions must not add a pruned pass.
        return self.prune_ratio > 0 and progress < self.delta - 1e-9

    def settings(self) -> dict[str, Any]:
        return {"policy": self.name, "prune_ratio": self.prune_ratio, "delta": self.delta}


def kept_count(num_candidates: int, num_others: int, prune_ratio: float, multiple_of: int) -> int:
    """How many of the candidates to keep: near ``(1 - r) * n``, and such that the visits divide.

    Args:
        num_candidates (int): Number n of well-learned samples.
        num_others (int): Number of samples that are kept for certain.
        prune_ratio (float): r in [0, 1).
        multiple_of (int): Number m that ``num_others`` + k shall be a multiple of.

    Returns:
        int: k in [1, n], of those that divide the nearest to ``(1 - r) * n``, and at least half of it, so that the
        weight n/k never exceeds 2/(1-r): one sample that stands for a thousand would make a step of its own. n itself
        where no such k divides (only possible for n < 2m) or where n is 0: the pass is then a full one, which is
        unbiased as well.
    """
    target = num_candidates * (1 - prune_ratio)
    lower = math.floor((num_others + target) / multiple_of) * multiple_of - num_others
    # The tolerance is for targets such as 0.3 * 10, whose half is not to fall on the wrong side of a whole number.
    fitting = [k for k in (lower, lower + multiple_of) if max(1, target / 2 - 1e-9) <= k <= num_candidates]
    return min(fitting, key=lambda k: abs(k - target), default=num_candidates)


def check_ratio(prune_ratio: Any) -> None:
    """Refuse a prune ratio that is outside [0, 1)."""
    if not is_number(prune_ratio) or not 0 <= prune_ratio < 1:
        raise ValueError(
            f"prune_ratio={prune_ratio!r} {what_is_wrong(prune_ratio, '[0, 1)')}: it is the chance that a well-learned "
            "sample is skipped; use 0.5 as in the paper, or 0 for full passes"
        )


def check_delta(delta: Any) -> None:
    """Refuse a share of the training that is outside (0, 1]."""
    if not is_number(delta) or not 0 < delta <= 1:
        raise ValueError(
            f"delta={delta!r} {what_is_wrong(delta, '(0, 1]')}: it is the share of the training after which pruning "
            "stops; use 0.875 as in the paper, or 1 to prune to the end"
        )
