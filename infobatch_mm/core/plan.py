"""A plan: which samples one pass visits, in which order, and the weight of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .worth import Worth


@dataclass(frozen=True)
class Plan:
    """One pass over the data.

    Attributes:
        indices (Tensor): Samples in the order of their visits, shape ``(K,)``, int64.
        weights (Tensor): Weight of each visit, shape ``(K,)``, float32: the inverse of the chance with
            which the draw included it, 1 for samples that were certain to be kept; all times ``scale``.
        pruned (bool): Whether the policy left samples out. A full pass is not pruned, even where the
            host's ``drop_last`` leaves a remainder unvisited.
        threshold (float, optional): Score below which a sample counts as well learned in this pass.
        blanks (tuple[int, int]): Samples without a valid pixel when it was drawn, in the data set and among its visits.
        scale (float): What all weights were multiplied by; see :meth:`with_mean_weight_one`. Defaults to 1.
        batch_size (int, optional): Visits of this pass in a batch, over all processes, where they are fewer than usual.
            Defaults to None: as many as the schedule says.
        worth (Worth, optional): What it costs and is worth by the scores it was drawn from. Defaults to None: they do
            not tell.
    """

    indices: Tensor
    weights: Tensor
    pruned: bool
    threshold: float | None = None
    blanks: tuple[int, int] = (0, 0)
    scale: float = 1.0
    batch_size: int | None = None
    worth: Worth | None = None

    def __len__(self) -> int:
        return self.indices.numel()

    def pair_weights(self, first: Tensor, second: Tensor) -> Tensor:
        """Weights of losses that two different samples of the plan share, as in mixed images.

        A full pass mixes a sample with each of the N - 1 others alike; this one with each of the K - 1 others
        that it visits, and only if both were drawn. The weight that undoes this is (K-1) / (N-1) over the
        chance that the plan holds both: the inverse of the product of their own chances, but that k of n
        samples drawn without replacement are together with the chance k (k-1) / (n (n-1)). It is 1 in full
        passes and where a policy does not rescale. Exact for a whole plan whose thinned samples weigh alike,
        as InfoBatch's do; otherwise to the order of 1/k. A common ``scale`` of the weights is the pairs' as well.

        Args:
            first (Tensor): Weights of the one sample of each pair, any shape, on any device.
            second (Tensor): Weights of the other.

        Returns:
            Tensor: Of the same shape, float32.
        """
        scale, level, without_replacement = self._pairs
        both = first * second * (scale / self.scale)
        return torch.where((first == level) & (second == level), both * without_replacement, both)

    @cached_property
    def _pairs(self) -> tuple[float, float, float]:
        """(K-1) / (N-1), the weight of thinned samples, and what drawing them without replacement changes."""
        level = float(self.weights.max()) if len(self) else 1.0
        kept = int(torch.count_nonzero(self.weights == level))
        if level == self.scale or len(self) < 2:
            return 1.0, level, 1.0
        # An unbiased plan's weights add up to the samples it stands for.
        population = float(self.weights.sum(dtype=torch.float64)) / self.scale
        candidates = level / self.scale * kept
        without_replacement = kept * (candidates - 1) / (max(1, kept - 1) * candidates)  # one alone makes no pair
        return (len(self) - 1) / (population - 1), level, without_replacement

    def first(self, visits: int) -> Plan:
        """The plan cut after its first ``visits`` visits; a random part of it, as plans are shuffled."""
        if visits >= len(self):
            return self
        return replace(self, indices=self.indices[:visits].clone(), weights=self.weights[:visits].clone())

    def with_mean_weight_one(self) -> Plan:
        """The same plan with weights divided by their mean: steps as large as the host's, in the unbiased direction."""
        if not self.pruned:
            return self
        scale = len(self) / float(self.weights.sum(dtype=torch.float64))
        return replace(self, weights=(self.weights * scale).to(torch.float32), scale=self.scale * scale)

    def unweighted(self) -> Plan:
        """The same plan with weights of one, which is biased."""
        return replace(self, weights=torch.ones_like(self.weights), scale=1.0)

    def sorted(self) -> Plan:
        """The same visits in the order of the data set."""
        order = self.indices.argsort()
        return replace(self, indices=self.indices[order], weights=self.weights[order])


def full_plan(num_samples: int, generator: torch.Generator) -> Plan:
    """Every sample once with weight 1, in random order.

    Args:
        num_samples (int): Size N of the data set.
        generator (torch.Generator): Source of the order.

    Returns:
        Plan: N visits.
    """
    order = _permutation(num_samples, generator).to(torch.int64)
    return Plan(order, torch.ones(num_samples, dtype=torch.float32, device="cpu"), pruned=False)


def thinned_plan(
    well_learned: Tensor,
    num_kept: int,
    generator: torch.Generator,
    threshold: float | None = None,
) -> Plan:
    """Keep exactly ``num_kept`` of the well-learned samples and all others, in random order.

    Each of the n well-learned samples is included with probability k/n, so its weight n/k makes the
    weighted sum over the plan an unbiased estimate of the sum over all samples (InfoBatch, eq. 6-9; the
    published 1/(1-r) is exact only in expectation over k).

    Args:
        well_learned (Tensor): The candidates for pruning, shape ``(N,)``, bool.
        num_kept (int): How many of them stay, 1 <= k <= n.
        generator (torch.Generator): Source of the draw and of the order.
        threshold (float, optional): Recorded in the plan.

    Returns:
        Plan: N - n + k visits.
    """
    # numpy finds positions and the k smallest keys several times faster than torch does on the CPU.
    candidates = np.flatnonzero(well_learned.numpy())
    others = np.flatnonzero(~well_learned.numpy())
    num_candidates = len(candidates)
    assert 1 <= num_kept <= num_candidates
    # The draw and the order of the visits are independent, so that any part of a plan is as unbiased as
    # the whole of it.
    keys = torch.empty(num_candidates, dtype=torch.int64, device="cpu").random_(generator=generator).numpy()
    drawn = candidates[np.argpartition(keys, num_kept - 1)[:num_kept]]
    kept = torch.from_numpy(np.concatenate([drawn, others]))
    order = _permutation(kept.numel(), generator)
    # Not of torch.where() with two numbers, which gives the default dtype: weights in bfloat16 are wrong by 1/256.
    ones = torch.ones(len(order), dtype=torch.float32, device="cpu")
    weights = ones.masked_fill_(order < num_kept, num_candidates / num_kept)
    return Plan(kept.index_select(0, order), weights, pruned=num_kept < num_candidates, threshold=threshold)


def drawn_plan(
    certain: np.ndarray,
    drawn: np.ndarray,
    weights: np.ndarray,
    generator: torch.Generator,
    threshold: float | None = None,
) -> Plan:
    """A plan of samples that are visited in any case and of drawn ones, in random order.

    Args:
        certain (ndarray): Samples of weight 1, shape ``(c,)``, int64.
        drawn (ndarray): The others, shape ``(k,)``, int64.
        weights (ndarray): Of the drawn ones, shape ``(k,)``, floats.
        generator (torch.Generator): Source of the order.
        threshold (float, optional): Recorded in the plan.

    Returns:
        Plan: c + k visits.
    """
    order = _permutation(len(drawn) + len(certain), generator)
    indices = torch.from_numpy(np.concatenate([drawn, certain]))
    each = torch.ones(len(order), dtype=torch.float32, device="cpu")
    each[: len(drawn)] = torch.from_numpy(weights)
    return Plan(indices.index_select(0, order), each.index_select(0, order), pruned=True, threshold=threshold)


def _permutation(length: int, generator: torch.Generator) -> Tensor:
    # int32 halves the memory traffic where it can hold the indices.
    dtype = torch.int32 if length < 2**31 else torch.int64
    return torch.randperm(length, generator=generator, dtype=dtype, device="cpu")
