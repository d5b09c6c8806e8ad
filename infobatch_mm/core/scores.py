"""The score of every sample: its last per-sample loss, or an average over its visits, and whether it has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .distributed import Group, all_gather_ragged, world_size
from .noise_levels import NoiseLevels
from .pending import PendingRecords
from .ranking import resolve_score
from .unusable import UnusableVisits

# Averages are taken in blocks of this many records, which are sorted: memory stays small.
_BLOCK = 2**20


class ScoreStore:
    """Scores of a data set of ``num_samples`` samples, on the CPU.

    Recording is asynchronous: :meth:`record` keeps the tensors where they are, so that no step waits for its device.
    :meth:`flush` moves them here: :meth:`merge`, :meth:`settle` and :meth:`state_dict` do so first; call it before
    reading an attribute.

    Args:
        num_samples (int): Size of the data set, at least 1.
        score_ema (float, optional): Decay a of the average over a sample's visits, in [0, 1): its loss of k visits ago
            counts a**k, and the score is the weighted mean, an exponential moving average with the correction of its
            beginning (Kingma and Ba, 2015, section 3). Where the loss depends on a random mask, crop or timestep,
            that ranks samples better than one draw does. Defaults to None: 0.9 for the scores that are averages.
        score (str, optional): ``'raw'``, the last loss, as in the paper; ``'ema'``, the average of losses;
            ``'timestep'``, the average of losses that are divided by the mean of their noise level
            (:class:`.NoiseLevels`), for diffusion models: these become scores when :meth:`settle` ends a pass.
            Defaults to None: ``'ema'`` where ``score_ema`` is given and not 0, else ``'raw'``.
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.

    Attributes:
        score (str): As above.
        score_ema (float): As above; 0 where the last loss counts alone.
        values (Tensor): Score of each sample, shape ``(num_samples,)``, float32; 0 where unseen.
        seen (Tensor): Whether a sample has a score, shape ``(num_samples,)``, bool.
        times_seen (Tensor): How often a score was recorded, shape ``(num_samples,)``, int32.
        unusable (UnusableVisits): Visits without a valid pixel, of a replaced sample, or with a loss that was NaN or
            infinite; never recorded.

    Raises:
        ValueError: If ``num_samples`` is smaller than 1, or the score none of these.
    """

    def __init__(
        self, num_samples: int, score_ema: float | None = None, score: str | None = None, group: Group = None
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"the data set is empty: num_samples={num_samples}, at least 1 is needed")
        self.score, self.score_ema = resolve_score(score, score_ema)
        self._group = group
        self.num_samples = int(num_samples)
        self.values = torch.zeros(num_samples, dtype=torch.float32, device="cpu")
        self.seen = torch.zeros(num_samples, dtype=torch.bool, device="cpu")
        self.times_seen = torch.zeros(num_samples, dtype=torch.int32, device="cpu")
        self.unusable = UnusableVisits(num_samples, group)
        self._pending = PendingRecords()
        self._unmerged: list[_Records] = []
        self._levels = NoiseLevels(group) if self.score == "timestep" else None

    def record(
        self, indices: Tensor, losses: Tensor, valid: Tensor | None = None, log_snr: Tensor | None = None
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

        Raises:
            ValueError: If it is needed and missing, or of another shape.
        """
        losses = losses.detach().to(torch.float32, copy=True)
        valid = torch.ones_like(losses, dtype=torch.bool) if valid is None else valid.clone()
        level = losses if self._levels is None else checked_level(log_snr, losses)
        self._pending.add((indices.clone(), losses, valid, level))
        if self._pending.is_due:
            self.flush()

    def flush(self) -> None:
        """Move all pending records into the store; the only place that waits for the device."""
        records = self._pending.take()
        if records is None:
            return
        indices, losses, valid, levels = records
        indices = indices.to(torch.int64)
        real, finite = indices >= 0, torch.isfinite(losses)
        if self._levels is not None:
            finite &= ~levels.isnan()
        self.unusable.record(blank=indices[real & ~valid], nonfinite=indices[real & valid & ~finite])
        usable = real & valid & finite
        indices, losses = indices[usable], losses[usable]
        if self._levels is not None:
            self._levels.hold(indices, losses, levels[usable])
            return
        if world_size(self._group) > 1:
            self._unmerged.append(_Records(indices, losses, self._held(indices)))
        self._write(indices, losses)

    def merge(self) -> None:
        """Exchange what each rank has recorded since the last merge; every rank must call it.

        Afterwards all ranks hold the same scores. Calling it again changes nothing. Indices travel as
        int64: a float tensor would round them above 2**24.
        """
        self.flush()
        if world_size(self._group) == 1:
            return
        self.unusable.merge()
        if self._levels is not None:
            self._levels.merge()
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
        if self._levels is not None:
            self._write(*self._levels.settle())

    def state_dict(self) -> dict[str, Any]:
        """Scores, seen mask, visits and counters: plain tensors and numbers."""
        self.flush()
        return {
            "scores": self.values.clone(),
            "seen": self.seen.clone(),
            "times_seen": self.times_seen.clone(),
            **self.unusable.state_dict(),
            "unmerged": self.unmerged,
            **({} if self._levels is None else {"noise_levels": self._levels.state_dict()}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; what was recorded since is forgotten."""
        self._pending.clear()
        self._unmerged = []
        self.values.copy_(state["scores"])
        self.seen.copy_(state["seen"])
        self.times_seen.copy_(state["times_seen"])
        self.unusable.load_state_dict(state)
        if self._levels is not None:
            self._levels.load_state_dict(state["noise_levels"])

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

    @property
    def unmerged(self) -> bool:
        """Whether this rank holds records that the other ranks have not seen yet."""
        return bool(self._unmerged) or (self._levels is not None and self._levels.unmerged)

    def _write(self, indices: Tensor, losses: Tensor) -> None:
        if self.score_ema:
            for start in range(0, len(indices), _BLOCK):
                self._average(indices[start : start + _BLOCK].numpy(), losses[start : start + _BLOCK].numpy())
            return
        # numpy's assignment keeps the last of repeated indices; torch does not promise which.
        where = indices.numpy()
        self.values.numpy()[where] = losses.numpy()
        self.seen.numpy()[where] = True
        np.add.at(self.times_seen.numpy(), where, 1)

    def _average(self, where: np.ndarray, new: np.ndarray) -> None:
        values, times = self.values.numpy(), self.times_seen.numpy()
        self.seen.numpy()[where] = True
        while len(where):  # once, but for samples that were visited several times
            _, first = np.unique(where, return_index=True)
            at = where[first]
            times[at] += 1
            share = ((1 - self.score_ema) / (1 - self.score_ema ** times[at])).astype(np.float32)
            values[at] += share * (new[first] - values[at])
            where, new = np.delete(where, first), np.delete(new, first)

    def _held(self, indices: Tensor) -> tuple[Tensor, Tensor] | None:
        """What records of these samples change; None where the next one takes its place in any case."""
        return (self.values[indices], self.seen[indices]) if self.score_ema else None

    def _take_back(self, records: _Records) -> None:
        np.subtract.at(self.times_seen.numpy(), records.indices.numpy(), 1)
        if records.before is not None:
            self.values[records.indices], self.seen[records.indices] = records.before


class _Records(NamedTuple):
    """Records of this rank that the others have not seen, and what the store held before."""

    indices: Tensor
    losses: Tensor
    before: tuple[Tensor, Tensor] | None


def checked_level(log_snr: Tensor | None, losses: Tensor) -> Tensor:
    """A copy of the noise levels of some losses, float32.

    Raises:
        ValueError: If they are missing, no logarithms, or of another shape than the losses.
    """
    if log_snr is None:
        raise ValueError(
            "score='timestep' needs the noise level of each sample: pass log_snr, the logarithm of its signal-to-noise "
            "ratio, with the losses, or use score='raw' or 'ema'"
        )
    if not isinstance(log_snr, Tensor):  # of which as_tensor() would make one on the default device
        log_snr = torch.as_tensor(log_snr, device=losses.device)
    if not log_snr.is_floating_point():
        raise ValueError(
            f"log_snr holds {log_snr.dtype}: it is the logarithm of the signal-to-noise ratio, not the timestep; "
            "infobatch_mm.diffusion.denoising.log_snr(scheduler, timesteps) gives that of a scheduler of diffusers"
        )
    if log_snr.shape != losses.shape:
        raise ValueError(
            f"{losses.numel()} losses but log_snr of shape {tuple(log_snr.shape)}: one noise level for each sample is "
            "needed"
        )
    return log_snr.detach().to(torch.float32, copy=True)


def _none(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device="cpu")
