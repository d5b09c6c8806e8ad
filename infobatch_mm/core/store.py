"""The score of every sample, and whether it has one; how losses become scores is the rule's affair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .distributed import Group, all_gather_ragged, gather, world_size
from .pending import PendingRecords
from .score_rule import ScoreRule, build_score
from .unusable import UnusableVisits


class ScoreStore:
    """Scores of a data set of ``num_samples`` samples, on the CPU.

    Recording is asynchronous: :meth:`record` keeps the tensors where they are, so that no step waits for its device.
    :meth:`flush` moves them here: :meth:`merge`, :meth:`settle` and :meth:`state_dict` do so first; call it before
    reading an attribute.

    Args:
        num_samples (int): Size of the data set, at least 1.
        score_ema (float, optional): Decay of the average over a sample's visits, in [0, 1). Defaults to None: 0.9 for
            the scores that are averages.
        score (str | dict | ScoreRule, optional): ``'raw'``, the last loss, as in the paper (:class:`.RawScore`);
            ``'ema'``, the average of losses (:class:`.EmaScore`); ``'timestep'``, the average of losses that are
            divided by the mean of their noise level, for diffusion models (:class:`.TimestepScore`);
            ``dict(type=name, ...)``, or an instance. Defaults to None: ``'ema'`` where ``score_ema`` is given and not
            0, else ``'raw'``.
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.

    Attributes:
        rule (ScoreRule): How losses become scores.
        score (str): Its name.
        score_ema (float): Its decay; 0 where the last loss counts alone.
        values (Tensor): Score of each sample, shape ``(num_samples,)``, float32; 0 where unseen.
        seen (Tensor): Whether a sample has a score, shape ``(num_samples,)``, bool.
        times_seen (Tensor): How often a score was recorded, shape ``(num_samples,)``, int32.
        unusable (UnusableVisits): Visits without a valid pixel, of a replaced sample, or with a loss that was NaN or
            infinite; never recorded.
        num_norms (int): Norms of gradients that came since :meth:`check_norms`, on this process.
        num_without_norm (int): Visits of which none came.

    Raises:
        ValueError: If ``num_samples`` is smaller than 1, or the score none of these.
    """

    def __init__(
        self,
        num_samples: int,
        score_ema: float | None = None,
        score: str | Mapping[str, Any] | ScoreRule | None = None,
        group: Group = None,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"the data set is empty: num_samples={num_samples}, at least 1 is needed")
        self.rule = build_score(score, score_ema, group)
        self.score, self.score_ema = self.rule.name, self.rule.score_ema
        self._group = group
        self.num_samples = int(num_samples)
        self.values = torch.zeros(num_samples, dtype=torch.float32, device="cpu")
        self.seen = torch.zeros(num_samples, dtype=torch.bool, device="cpu")
        self.times_seen = torch.zeros(num_samples, dtype=torch.int32, device="cpu")
        self.unusable = UnusableVisits(num_samples, group)
        self.num_norms = self.num_without_norm = 0
        self._pending = PendingRecords()
        self._unmerged: list[_Records] = []

    def record(
        self,
        indices: Tensor,
        losses: Tensor,
        valid: Tensor | None = None,
        log_snr: Tensor | None = None,
        evidence: Tensor | None = None,
    ) -> None:
        """Take the losses of one batch as the new scores of its samples.

        Args:
            indices (Tensor): Sample indices, shape ``(B,)``, int64, on any device. A negative one marks a
                visit that only fills a batch up: neither recorded nor counted.
            losses (Tensor): Unweighted per-sample losses, shape ``(B,)``, on any device. Detached and
                copied, as the other arguments are; the inputs are left alone.
            valid (Tensor, optional): Which of them are to be recorded at all, shape ``(B,)``, bool.
            log_snr (Tensor, optional): Natural logarithm of the signal-to-noise ratio of each sample's noise level,
                shape ``(B,)``; needed where ``score='timestep'``, not looked at elsewhere.
            evidence (Tensor, optional): What :meth:`.ScoreRule.evidence` said of each when its batch was in hand, shape
                ``(B,)``, where the losses come in another order now. Defaults to what it says of these.

        Raises:
            ValueError: If it is needed and missing, or of another shape.
        """
        self._make_room()
        losses = losses.detach().to(torch.float32, copy=True)
        valid = torch.ones_like(losses, dtype=torch.bool) if valid is None else valid.clone()
        evidence = self.rule.evidence(losses, log_snr) if evidence is None else evidence.clone()
        self._pending.add((indices.clone(), losses, valid, evidence))

    def record_norms(self, indices: Tensor, norms: Tensor) -> None:
        """Take norms of gradients as scores, which the backward pass is yet to fill in.

        Args:
            indices (Tensor): As :meth:`record` takes them.
            norms (Tensor): What :class:`.SampleNorms` gave, shape ``(B,)``, float32. Kept as it is: filled in where it
                lies. What is below 0 by the time it is asked for never came.
        """
        self._make_room()
        self._pending.add((indices.clone(), norms, torch.ones_like(norms, dtype=torch.bool), norms))

    def _make_room(self) -> None:
        # Before the next record: the one before it is complete by then.
        self._pending.make_room()
        if self._pending.is_due:
            self.flush()

    def flush(self) -> None:
        """Move all pending records into the store; the only place that waits for the device."""
        records = self._pending.take()
        if records is None:
            return
        indices, losses, valid, evidence = records
        indices = indices.to(torch.int64)
        real, finite = indices >= 0, torch.isfinite(losses) & ~evidence.isnan()
        self.unusable.record(blank=indices[real & ~valid], nonfinite=indices[real & valid & ~finite])
        usable = real & valid & finite
        if self.rule.takes_norms:
            came = losses >= 0
            self.num_norms += int(torch.count_nonzero(usable & came))
            self.num_without_norm += int(torch.count_nonzero(usable & ~came))
            usable = usable & came
        indices, losses = indices[usable], losses[usable]
        if self.rule.defers:
            self.rule.hold(indices, losses, evidence[usable])
            return
        if world_size(self._group) > 1:
            self._unmerged.append(_Records(indices, losses, self._held(indices)))
        self._write(indices, losses)

    def check_norms(self) -> None:
        """Refuse to go on where gradients come back to hardly a sample; every process must call it, at a pass's end.

        Raises:
            ValueError: On every process, with both counts.
        """
        if not self.rule.takes_norms:
            return
        self.flush()
        counts = gather((self.num_norms, self.num_without_norm), self._group)
        self.num_norms = self.num_without_norm = 0
        came, missing = (sum(each) for each in zip(*counts, strict=True))
        if missing > came:
            raise ValueError(
                f"score='gradient': no gradient came back for {missing} of the {came + missing} visits of this pass, "
                "so their samples have no score: call backward() on what weigh() returned, in each step and before the "
                "next one, and give weigh(..., outputs=...) the model's own outputs, or observe() the layer that the "
                "losses come from; or use another score"
            )

    def merge(self) -> None:
        """Exchange what each rank has recorded since the last merge; every rank must call it.

        Afterwards all ranks hold the same scores. Calling it again changes nothing. Indices travel as
        int64: a float tensor would round them above 2**24.
        """
        self.flush()
        if world_size(self._group) == 1:
            return
        self.unusable.merge()
        if self.rule.defers:
            self.rule.merge()
            return
        indices = torch.cat([each.indices for each in self._unmerged] or [_none(torch.int64)])
        losses = torch.cat([each.losses for each in self._unmerged] or [_none(torch.float32)])
        # Our own records are written already: take them back and write all ranks' in rank order, so that a
        # sample visited on two ranks ends with the same score everywhere.
        while self._unmerged:
            self._take_back(self._unmerged.pop())
        gathered_indices = all_gather_ragged(indices, self._group)
        gathered_losses = all_gather_ragged(losses, self._group)
        for rank_indices, rank_losses in zip(gathered_indices, gathered_losses, strict=True):
            self._write(rank_indices, rank_losses)

    def settle(self) -> None:
        """End a pass, after a merge: what had to wait for the means of its noise levels becomes scores."""
        self.flush()
        if self.rule.defers:
            self._write(*self.rule.settle())

    def state_dict(self) -> dict[str, Any]:
        """Scores, seen mask, visits and counters: plain tensors and numbers."""
        self.flush()
        return {
            "scores": self.values.clone(),
            "seen": self.seen.clone(),
            "times_seen": self.times_seen.clone(),
            **self.unusable.state_dict(),
            "unmerged": self.unmerged,
            **self.rule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; what was recorded since is forgotten."""
        self._pending.clear()
        self._unmerged = []
        self.values.copy_(state["scores"])
        self.seen.copy_(state["seen"])
        self.times_seen.copy_(state["times_seen"])
        self.unusable.load_state_dict(state)
        self.rule.load_state_dict(state)

    def settings(self) -> dict[str, Any]:
        """What samples are ranked by, as plain values."""
        return self.rule.settings()

    @property
    def num_nonfinite(self) -> int:
        """Visits whose loss was NaN or infinite."""
        return self.unusable.num_nonfinite

    @property
    def num_invalid(self) -> int:
        """Visits without a valid pixel, or of a replaced sample."""
        return self.unusable.num_invalid

    @property
    def num_unscored(self) -> int:
        """Samples that were visited and have no score: policies that go by scores never prune them."""
        return int(torch.count_nonzero(self.unusable.samples & ~self.seen))

    def blanks(self, indices: Tensor) -> tuple[int, int]:
        """Samples that never had a valid pixel: in the data set, and among some indices."""
        blank = self.unusable.blank & ~self.seen
        return int(torch.count_nonzero(blank)), int(torch.count_nonzero(blank[indices]))

    @property
    def unmerged(self) -> bool:
        """Whether this rank holds records that the other ranks have not seen yet."""
        return bool(self._unmerged) or self.rule.unmerged

    def _write(self, indices: Tensor, losses: Tensor) -> None:
        self.rule.fold(self, indices.numpy(), losses.numpy())

    def _held(self, indices: Tensor) -> tuple[Tensor, Tensor] | None:
        """What records of these samples change; None where the next one takes its place in any case."""
        return None if self.rule.overwrites else (self.values[indices], self.seen[indices])

    def _take_back(self, records: _Records) -> None:
        np.subtract.at(self.times_seen.numpy(), records.indices.numpy(), 1)
        if records.before is not None:
            self.values[records.indices], self.seen[records.indices] = records.before


class _Records(NamedTuple):
    """Records of this rank that the others have not seen, and what the store held before."""

    indices: Tensor
    losses: Tensor
    before: tuple[Tensor, Tensor] | None


def _none(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device="cpu")
