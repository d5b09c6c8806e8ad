"""Pruning policies: from scores to a plan. ``policy_registry.py`` finds them by name."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import is_number, plain
from .checks import what_is_wrong as _wrong
from .plan import Plan, thinned_plan


class PruningPolicy(ABC):
    """Decides which samples a pass visits.

    A policy is stateless: what it needs is passed in, so that every rank and every resumed run draws
    the same plan.
    """

    #: Name under which users select the policy and checkpoints record it.
    name: str
    #: Whether it prunes nothing before samples have scores, hence nothing in a training of one pass.
    needs_scores = False

    @abstractmethod
    def is_active(self, progress: float) -> bool:
        """Whether passes that start at ``progress`` (share of the whole training, in [0, 1)) are pruned."""

    @abstractmethod
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


class AnnealedPolicy(PruningPolicy):
    """What policies share that prune with a ratio r until the share δ of the training is done.

    The number of kept candidates is brought to where the visits make full batches, but no further than that a weight
    stays within twice the nominal 1/(1-r): otherwise the pass is a full one.

    Args:
        prune_ratio (float): Chance r that a candidate is skipped, in [0, 1). Defaults to 0.5.
        delta (float): Share of the training after which pruning stops, in (0, 1]. Defaults to 0.875.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, prune_ratio: float = 0.5, delta: float = 0.875) -> None:
        if not is_number(prune_ratio) or not 0 <= prune_ratio < 1:
            raise ValueError(
                f"prune_ratio={prune_ratio!r} {_wrong(prune_ratio, '[0, 1)')}: it is the chance that a well-learned "
                "sample is skipped; use 0.5 as in the paper, or 0 for full passes"
            )
        if not is_number(delta) or not 0 < delta <= 1:
            raise ValueError(
                f"delta={delta!r} {_wrong(delta, '(0, 1]')}: it is the share of the training after which pruning "
                "stops; use 0.875 as in the paper, or 1 to prune to the end"
            )
        self.prune_ratio = float(prune_ratio)
        self.delta = float(delta)

    def is_active(self, progress: float) -> bool:
        # The tolerance keeps 0.7 * 10 passes at seven: binary fractions must not add a pruned pass.
        return self.prune_ratio > 0 and progress < self.delta - 1e-9

    def settings(self) -> dict[str, Any]:
        return {"policy": self.name, "prune_ratio": self.prune_ratio, "delta": self.delta}

    def _thinned(
        self, candidates: Tensor, generator: torch.Generator, multiple_of: int, threshold: float | None = None
    ) -> Plan | None:
        """Keep the share 1 - r of the candidates and all others."""
        num_candidates = int(torch.count_nonzero(candidates))
        num_kept = kept_count(num_candidates, candidates.numel() - num_candidates, self.prune_ratio, multiple_of)
        if num_kept == num_candidates:
            return None
        return thinned_plan(candidates, num_kept, generator, threshold=threshold)


class InfoBatchPolicy(AnnealedPolicy):
    """InfoBatch (Qin et al., ICLR 2024): soft pruning below the mean score, rescaling, annealing.

    A sample whose last loss is below the mean of all seen samples is well learned and skipped with
    probability ``prune_ratio`` (eq. 3); the kept ones weigh n/k (eq. 6). After the share ``delta`` of
    the training every sample is visited (annealing). Differences from the reference code: the draw is of
    an exact count with its true inverse inclusion probability as weight, unseen samples take no part in
    the mean and are never pruned.

    Args:
        prune_ratio (float): Chance r that a well-learned sample is skipped, in [0, 1). Defaults to 0.5.
        delta (float): Share of the training after which pruning stops, in (0, 1]. Defaults to 0.875.
        quantile (float, optional): Share of the seen samples, in (0, 1], that count as well learned: those with the
            lowest scores. A pass then saves ``quantile * prune_ratio`` of its visits, however scores are distributed,
            which makes scores comparable. Defaults to None: those below the mean, as in the paper.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "infobatch"
    needs_scores = True

    def __init__(self, prune_ratio: float = 0.5, delta: float = 0.875, quantile: float | None = None) -> None:
        super().__init__(prune_ratio, delta)
        if quantile is not None and (not is_number(quantile) or not 0 < quantile <= 1):
            raise ValueError(
                f"quantile={quantile!r} {_wrong(quantile, '(0, 1]')}: it is the share of the samples that count as "
                "well learned; leave it out for the ones below the mean score"
            )
        self.quantile = None if quantile is None else float(quantile)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **({} if self.quantile is None else {"quantile": self.quantile})}

    def draw(self, scores: Tensor, seen: Tensor, generator: torch.Generator, multiple_of: int) -> Plan | None:
        if self.prune_ratio == 0 or not seen.any():
            return None
        if self.quantile is not None:
            candidates, threshold = _lowest(scores, seen, self.quantile)
            return self._thinned(candidates, generator, multiple_of, threshold)
        threshold = float(np.mean(scores.numpy(), where=seen.numpy(), dtype=np.float64))
        return self._thinned((scores < threshold) & seen, generator, multiple_of, threshold)


class RandomPolicy(AnnealedPolicy):
    """Random pruning with rescaling and annealing: the control that knows no scores.

    Every sample is skipped with probability ``prune_ratio``, whatever its loss, from the first pass on; the
    kept ones weigh n/k. RS2 (Okanovic et al., ICLR 2024) with InfoBatch's weights and annealing.

    Args:
        prune_ratio (float): Chance r that a sample is skipped, in [0, 1). Defaults to 0.5.
        delta (float): Share of the training after which pruning stops, in (0, 1]. Defaults to 0.875.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "random"

    def draw(self, scores: Tensor, seen: Tensor, generator: torch.Generator, multiple_of: int) -> Plan | None:
        if self.prune_ratio == 0:
            return None
        return self._thinned(torch.ones_like(seen), generator, multiple_of)


class NoPruning(PruningPolicy):
    """Every sample in every pass with weight 1; scores are still recorded."""

    name = "none"

    def is_active(self, progress: float) -> bool:
        return False

    def draw(self, scores: Tensor, seen: Tensor, generator: torch.Generator, multiple_of: int) -> Plan | None:
        return None


def _lowest(scores: Tensor, seen: Tensor, quantile: float) -> tuple[Tensor, float | None]:
    """Which samples are the given share of the seen ones with the lowest scores, and the lowest score above them."""
    where = np.flatnonzero(seen.numpy())
    count = round(quantile * len(where))
    candidates = torch.zeros_like(seen)
    if count == len(where):
        candidates.copy_(seen)
        return candidates, None
    order = np.argpartition(scores.numpy()[where], count)  # exactly so many, also of equal scores
    candidates.numpy()[where[order[:count]]] = True
    return candidates, float(scores[where[order[count]]])


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
