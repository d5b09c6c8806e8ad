"""Losses of one pass as shares of what is usual at their noise level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.distributed import Group
from .held import HeldVisits

#: Width of a bin of log-SNR: over it the mean loss of a diffusion model changes by less than images differ.
BIN_WIDTH = 0.25
#: Log-SNR beyond which noise levels are one: nothing but the image there, or nothing but noise.
LIMIT = 20.0
NUM_BINS = round(2 * LIMIT / BIN_WIDTH) + 1
#: What the sums of the passes before count for.
_DECAY = 0.5
#: Losses that a mean is of at least: where a bin has fewer, its neighbours on both sides join in.
_ENOUGH = 10


class NoiseLevels:
    """Divides each loss of a diffusion training by the running mean of the losses at its noise level.

    The loss that even an ideal model is left with differs by orders of magnitude over the noise levels, so that a
    loss at a random one says which level it was rather than which image. As a share of the mean of its bin of log-SNR
    it says something of the image. The mean is over the passes so far, each counting half of the one after it; bins
    with fewer than ten losses are taken together with their neighbours. The shares of one pass are 1 on average, so
    that they do not fall with the loss as the training goes on.

    Losses are held until the pass is over (:meth:`settle`), because only then their means are known: they
    are the same on any number of processes, whatever the order of the batches.

    Args:
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.
    """

    def __init__(self, group: Group = None) -> None:
        self._held = HeldVisits(torch.uint8, group)
        self._sums = np.zeros((2, NUM_BINS))  # of the losses, and how many

    def hold(self, indices: Tensor, losses: Tensor, log_snr: Tensor) -> None:
        """Keep the losses of some visits.

        Args:
            indices (Tensor): Sample indices, shape ``(B,)``, int64, on the CPU.
            losses (Tensor): Finite losses, shape ``(B,)``, float32, on the CPU.
            log_snr (Tensor): Natural logarithm of the signal-to-noise ratio, shape ``(B,)``, float, infinite ones too.

        Raises:
            ValueError: If a loss is negative.
        """
        if bool((losses < 0).any()):
            raise ValueError(
                f"score='timestep' divides losses by the mean of their noise level, which makes sense for none below "
                f"0, but got {float(losses.min()):g}: use score='raw' or 'ema' for this loss"
            )
        self._held.add(indices, losses, bins_of(log_snr))

    def merge(self) -> None:
        """Exchange what is held; every rank must call it."""
        self._held.merge()

    def settle(self) -> tuple[Tensor, Tensor]:
        """End a pass, after a merge.

        Returns:
            tuple[Tensor, Tensor]: Indices of its visits in ascending order, shape ``(V,)``, int64, and the loss of each
            as a share of the mean at its noise level, shape ``(V,)``, float32, 1 on average.
        """
        indices, losses, bins = self._held.take()
        loss, level = losses.numpy().astype(np.float64), bins.numpy()
        self._sums *= _DECAY
        self._sums += [np.bincount(level, loss, NUM_BINS), np.bincount(level, minlength=NUM_BINS)]
        shares = loss / self._means()[level]
        if shares.any():
            shares /= shares.mean()
        return indices, torch.from_numpy(shares.astype(np.float32))

    def _means(self) -> np.ndarray:
        """Mean loss at each bin, over as many bins around it as hold enough losses; 1 where all are 0."""
        upto = np.concatenate([np.zeros((2, 1)), self._sums.cumsum(1)], 1)
        at = np.arange(NUM_BINS)
        means = np.ones(NUM_BINS)
        for reach in range(NUM_BINS - 1, -1, -1):
            first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, NUM_BINS)
            total, count = upto[:, last] - upto[:, first]
            enough = (total > 0) & (count >= (_ENOUGH if reach < NUM_BINS - 1 else 0))
            means[enough] = total[enough] / count[enough]
        return means

    @property
    def unmerged(self) -> bool:
        """Whether this rank holds losses that the other ranks have not seen yet."""
        return self._held.unmerged

    def state_dict(self) -> dict[str, Tensor]:
        """The losses held and the running sums, as plain tensors."""
        indices, losses, bins = self._held.peek()
        return {"indices": indices, "losses": losses, "bins": bins, "sums": torch.from_numpy(self._sums.copy())}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state; what was held is forgotten."""
        self._held.put(state["indices"], state["losses"], state["bins"])
        self._sums = state["sums"].cpu().numpy().copy()


def bins_of(log_snr: Tensor) -> Tensor:
    """Bins of noise levels: shape ``(B,)``, uint8, below :data:`NUM_BINS`, on the device of ``log_snr``."""
    return ((log_snr.clamp(-LIMIT, LIMIT) + LIMIT) / BIN_WIDTH).to(torch.uint8)


def fits(state: Any, num_samples: int) -> bool:
    """Whether it is the state of :class:`NoiseLevels` of so many samples."""
    dtypes = {"indices": torch.int64, "losses": torch.float32, "bins": torch.uint8, "sums": torch.float64}
    if not isinstance(state, Mapping) or any(
        not isinstance(state.get(key), Tensor) or state[key].dtype != dtype for key, dtype in dtypes.items()
    ):
        return False
    indices, losses, bins, sums = (state[key] for key in dtypes)
    return (
        indices.dim() == 1
        and indices.shape == losses.shape == bins.shape
        and sums.shape == (2, NUM_BINS)
        and not bool(((indices < 0) | (indices >= num_samples)).any())
        and not bool((bins >= NUM_BINS).any())
        and all(bool((torch.isfinite(each) & (each >= 0)).all()) for each in (losses, sums))
    )
