"""Dynamic data pruning for any PyTorch loop."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, IterableDataset, Sampler

from .distributed import rank, require_equal, world_size
from .loader import IndexedItems
from .policies import PruningPolicy, build_policy
from .pruner import Pruner
from .sampler import PlanSampler
from .schedule import EpochSchedule


class InfoBatch:
    """InfoBatch for a training loop of your own.

    Skips a share of the samples that the model already knows in each pass and rescales the loss of the
    others so that the gradient stays unbiased (Qin et al., "InfoBatch: Lossless Training Speed Up by
    Unbiased Dynamic Data Pruning", ICLR 2024).

    Args:
        num_samples (int): Size of the data set, at least 1.
        num_epochs (int): Passes over the data in the whole training, at least 1.
        prune_ratio (float): Chance r that a well-learned sample is skipped, in [0, 1). Defaults to 0.5.
        delta (float): Share of the training after which every sample is visited, in (0, 1].
            Defaults to 0.875.
        policy (str | PruningPolicy): ``'infobatch'``, ``'random'``, ``'none'``, or a policy of your own.
            Defaults to ``'infobatch'``.
        seed (int): Seed of the draws, the same on every process. Defaults to 0.
        batch_size (int, optional): Global batch size, over all processes; pruned passes then consist of
            full batches only. Without it the last batch of a pass is the loader's affair.
        shuffle (bool): Whether passes are in random order. Defaults to True.
        item_seed (bool): Whether the items of :meth:`attach` are read under a seed of their own, made of seed,
            pass and position in the pass, so that augmentations repeat after a resume. Defaults to False.
        score (str, optional): What samples are ranked by, with any policy: ``'raw'``, their last loss, as in the
            paper; ``'ema'``, the average over their visits, for losses that depend on a random mask, crop or timestep;
            ``'timestep'``, that of losses over the mean loss at their noise level, for diffusion models, which needs
            the ``log_snr`` of :meth:`weigh`. See :class:`.ScoreStore`. Defaults to ``'raw'``, or ``'ema'`` where
            ``score_ema`` is given.
        score_ema (float, optional): Decay of the average, in [0, 1). Defaults to 0.9 for scores that are averages.

    Where ``torch.distributed`` is initialised, every process makes one with equal arguments, and takes its
    share of each pass.

    Raises:
        ValueError: If an argument is out of its range, or not the same on every process.

    Example:
        >>> infobatch = InfoBatch(4, num_epochs=2, seed=0)
        >>> data = infobatch.attach(["a", "b", "c", "d"])
        >>> for epoch in range(2):
        ...     for i in infobatch.sampler:
        ...         index, item = data[i]
        ...         loss = infobatch.weigh(torch.tensor([1.0]), [index])
        >>> infobatch.summary()["passes_done"]
        2
    """

    def __init__(
        self,
        num_samples: int,
        num_epochs: int,
        prune_ratio: float = 0.5,
        delta: float = 0.875,
        *,
        policy: str | PruningPolicy = "infobatch",
        seed: int = 0,
        batch_size: int | None = None,
        shuffle: bool = True,
        item_seed: bool = False,
        score: str | None = None,
        score_ema: float | None = None,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"the data set is empty: num_samples={num_samples}, at least 1 is needed")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: it is the global batch size and must be at least 1")
        if batch_size is not None and batch_size > num_samples:
            raise ValueError(
                f"one global batch holds {batch_size} samples but the data set only {num_samples}: there is nothing to "
                "prune within a pass; use a smaller batch size"
            )
        world = world_size()
        if batch_size is not None and batch_size % world:
            raise ValueError(f"batch_size={batch_size} is the global batch size and must divide by {world} processes")
        chosen = build_policy(policy, prune_ratio, delta)
        # Without a batch size the kept count need only divide among the processes.
        schedule = EpochSchedule(num_samples, num_epochs, batch_size=batch_size or world)
        self._pruner = Pruner(schedule, chosen, seed, shuffle, item_seed=item_seed, score_ema=score_ema, score=score)
        require_equal(
            num_samples=num_samples,
            num_epochs=num_epochs,
            **chosen.settings(),
            seed=seed,
            batch_size=batch_size,
            shuffle=shuffle,
            item_seed=item_seed,
            score=self._pruner.store.score,
            score_ema=self._pruner.store.score_ema,
        )
        self._sampler = _WalkSampler(self._pruner, rank(), world)

    def attach(self, dataset: Any) -> Dataset:
        """Wrap a map-style data set so that its items come as ``(index, item)``.

        Raises:
            ValueError: If its length is not ``num_samples``, or if it is an iterable data set.
        """
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"{type(dataset).__name__} is an iterable data set: pruning must choose samples by index; use a "
                "map-style data set with __len__ and __getitem__"
            )
        if len(dataset) != self._pruner.schedule.num_samples:
            raise ValueError(
                f"this InfoBatch was made for {self._pruner.schedule.num_samples} samples, the data set has "
                f"{len(dataset)}"
            )
        return IndexedItems(dataset)

    @property
    def sampler(self) -> Sampler[int]:
        """The sampler to give to the ``DataLoader``; each walk is one pass."""
        return self._sampler

    def weigh(
        self, losses: Tensor, index: Tensor | np.ndarray | Sequence[int], log_snr: Tensor | None = None
    ) -> Tensor:
        """Weigh the losses of a batch and record them as scores.

        Args:
            losses (Tensor): Per-sample losses, shape ``(B,)``, any float dtype, on any device; e.g. from a
                criterion with ``reduction='none'``. Left untouched.
            index (Tensor | ndarray | Sequence[int]): Their sample indices, shape ``(B,)``, as
                :meth:`attach` delivered them.
            log_snr (Tensor, optional): Natural logarithm of the signal-to-noise ratio of each sample's noise level,
                shape ``(B,)``; needed for ``score='timestep'``, not looked at otherwise.

        Returns:
            Tensor: Scalar ``mean(weight * loss)``, to call ``backward()`` on. NaN and infinite losses are
            not recorded as scores.

        Raises:
            ValueError: If the shapes do not fit, an index is not part of the current pass, or ``log_snr`` is needed and
                missing.
        """
        if losses.dim() != 1:
            raise ValueError(
                f"weigh() needs one loss per sample, shape (B,), but got shape {tuple(losses.shape)}: use "
                "reduction='none' and average over all but the first dimension"
            )
        index = torch.as_tensor(index)
        if index.shape != losses.shape:
            raise ValueError(
                f"{losses.numel()} losses but {index.numel()} sample indices of shape {tuple(index.shape)}"
            )
        if index.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            raise ValueError(f"sample indices must be integers, got {index.dtype}: floats round large indices")
        return self._sampler.weigh(losses, index.to(torch.int64), log_snr)

    def merge(self) -> None:
        """Exchange the scores of this pass among processes, before a checkpoint; every process must call it.

        At the end of a pass it happens by itself. It may be called at any step, any number of times; in one
        process it does nothing.
        """
        self._pruner.store.merge()

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: plain tensors and numbers, loads with ``weights_only=True``.

        On several processes call :meth:`merge` on all of them first, then this on one.
        """
        return {**self._pruner.state_dict(), "tail_dropped": self._sampler.tail_dropped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the next unvisited position of the same plan.

        Raises:
            ValueError: If the state belongs to another data set or policy, or to a newer version, or is
                damaged.
        """
        self._pruner.load_state_dict(state)
        self._sampler.forget_walk(end_pass=bool(state.get("tail_dropped", False)))

    def summary(self) -> dict[str, Any]:
        """Policy, passes, visits, saved share and one entry per pass, as plain numbers."""
        return self._pruner.summary()


class _WalkSampler(PlanSampler):
    """A plan sampler that knows from its walks and from what was weighed when a pass is over.

    A pass is over when all its visits were weighed, or when a new walk starts after the last one was
    walked to its end. What was handed out and not weighed counts for nothing: a peek at a loader is free,
    and a walk that was broken off goes on with the rest.
    """

    def __init__(self, pruner: Pruner, rank: int, world: int) -> None:
        super().__init__(pruner, rank, world)
        self._drop_last: bool | None = None
        self._warned_batch = False
        self._weighed = torch.zeros(pruner.schedule.num_samples, dtype=torch.bool)
        self.forget_walk()

    def forget_walk(self, end_pass: bool = False) -> None:
        """Start afresh, after a pass or with a loaded state, which may be that of a pass whose tail was dropped."""
        if end_pass:
            self.pruner.finish_pass()
        self._last_batch = 0  # over all processes
        self._walked = False
        self._weighed.zero_()

    def __iter__(self) -> Iterator[int]:
        if self.world > 1 and any(frame.f_globals.get("__name__") == "accelerate.data_loader" for frame in _callers()):
            raise ValueError(
                f"accelerate shares this loader out among its {self.world} processes, but the sampler has done so "
                "already: leave the loader out of prepare(), and move its batches to accelerator.device yourself"
            )
        if world_size() != self.world:
            raise ValueError(
                f"this InfoBatch was made for {self.world} processes, but there are {world_size()} now: make it after "
                "init_process_group, or after Accelerator()"
            )
        self._drop_last = _drop_last()
        if self._walked or self.tail_dropped:
            self.forget_walk(end_pass=True)
        return self._walk()

    def _walk(self) -> Iterator[int]:
        current = self.pruner.pass_index
        yield from super().__iter__()
        # Worker processes read ahead, so the end of their walk says nothing about what was used of it.
        if current == self.pruner.pass_index and not _reads_ahead():
            self._walked = True

    @property
    def tail_dropped(self) -> bool:
        """Whether of a pass no more is left than the tail that a ``drop_last`` loader drops."""
        pruner = self.pruner
        if pruner.visited == 0 or self._drop_last is False:
            return False
        return len(pruner.begin_pass()) - pruner.visited < self._last_batch

    def weigh(self, losses: Tensor, index: Tensor, log_snr: Tensor | None = None) -> Tensor:
        """Weigh and record one batch; see :meth:`InfoBatch.weigh`."""
        pruner, batch = self.pruner, len(index)
        unweighted = losses
        real, padding = index, torch.zeros_like(index, dtype=torch.bool)
        if self.world > 1:  # only there does a plan need padding
            self._check_batch(batch)
            padding = index < 0
            real = torch.where(padding, -1 - index, index)
            losses = torch.where(padding.to(losses.device), 0.0, losses)  # a weight of 0 would keep a NaN
        weighted = (pruner.weights(real).to(losses.device) * losses).mean() * self._tail_scale(batch)
        pruner.record(index, unweighted, log_snr=log_snr)
        fresh = batch
        if index.device.type == "cpu":  # elsewhere a look would make the step wait
            # A second loss of the same batch (as some optimisers need) is no second visit.
            fresh = batch - int((self._weighed[real] & ~padding).sum())
            self._weighed[real] = True
        self._last_batch = batch * self.world
        pruner.advance(fresh * self.world)
        if pruner.pass_done:
            self.forget_walk(end_pass=True)
        return weighted

    def _check_batch(self, batch: int) -> None:
        whole = self.pruner.schedule.batch_size
        if not self._warned_batch and whole > self.world and batch * self.world > whole:
            self._warned_batch = True
            warnings.warn(
                f"{batch} samples on each of {self.world} processes are {batch * self.world} at once, but batch_size="
                f"{whole} is the global batch size: give the DataLoader batch_size={whole // self.world}",
                stacklevel=4,
            )

    def _tail_scale(self, batch: int) -> float:
        """Factor that makes the mean over processes the mean over the real visits of this batch."""
        visits = len(self.pruner.begin_pass())
        missing = -visits % self.world
        is_last = self.pruner.visited + batch * self.world >= visits
        return batch * self.world / (batch * self.world - missing) if missing and is_last else 1.0

    def _share(self, indices: Tensor) -> Tensor:
        # Where the plan does not divide, repeated visits are marked by a negative index: they weigh 0.
        missing = -len(indices) % self.world
        if missing:
            indices = torch.cat([indices, -1 - indices[:1].repeat(missing)])
        return super()._share(indices)


def _reads_ahead() -> bool:
    """Whether a ``DataLoader`` with workers is asking, which it does before anything was used."""
    return any(frame.f_code.co_name == "_try_put_index" for frame in _callers())


def _drop_last() -> bool | None:
    """Whether the loader that is asking drops the tail of a walk, None where that cannot be known."""
    for frame in _callers():
        asking = frame.f_locals.get("self")
        if isinstance(asking, BatchSampler) and type(asking) is BatchSampler:
            return asking.drop_last
    return None


def _callers() -> Iterator[FrameType]:
    """Who is asking, from the nearest on."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
