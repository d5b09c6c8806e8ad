"""The average of a sample's losses, each as a share of what is usual at its noise level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.distributed import Group
from ..core.score_rule import Columns, ScoreRule, register_score
from ..core.worth import as_norms
from .ema import DEFAULT_EMA, average
from .noise_levels import NoiseLevels, fits


@register_score
class TimestepScore(ScoreRule):
    """Losses of a diffusion model over the mean loss at their noise level (:class:`.NoiseLevels`), averaged.

    They become scores when the pass ends, because only then the means of its noise levels are known.

    Args:
        score_ema (float): Decay of the average over visits, in [0, 1). Defaults to 0.9.
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.
    """

    name = "timestep"
    defers = True
    needs_noise_levels = True
    state_version = 3

    def __init__(self, score_ema: float = DEFAULT_EMA, group: Group = None) -> None:
        super().__init__(group)
        self.score_ema = float(score_ema)
        self._levels = NoiseLevels(group)

    def evidence(self, losses: Tensor, log_snr: Tensor | None) -> Tensor:
        return checked_level(log_snr, losses)

    def hold(self, indices: Tensor, losses: Tensor, evidence: Tensor) -> None:
        self._levels.hold(indices, losses, evidence)

    def merge(self) -> None:
        self._levels.merge()

    def settle(self) -> tuple[Tensor, Tensor]:
        return self._levels.settle()

    def fold(self, columns: Columns, where: np.ndarray, losses: np.ndarray) -> None:
        average(columns, where, losses, self.score_ema)

    def norms(self, scores: np.ndarray) -> np.ndarray:
        # A denoising loss is the squared norm of its gradient at the output.
        return np.sqrt(as_norms(scores))

    @property
    def unmerged(self) -> bool:
        return self._levels.unmerged

    def state_dict(self) -> dict[str, Any]:
        return {"noise_levels": self._levels.state_dict()}

    @classmethod
    def damaged(cls, state: Mapping[str, Any], num_samples: int) -> str | None:
        return None if fits(state.get("noise_levels"), num_samples) else "noise_levels"

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._levels.load_state_dict(state["noise_levels"])


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
