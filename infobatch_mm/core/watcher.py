"""The books of a host that walks its data in an order of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from .training import Training
from .worth import Worth


class Watcher(Training):
    """Records scores and counts visits, and draws nothing: every sample is visited, with weight 1."""

    keeps_order = True

    def open_pass(self) -> int:
        return self.schedule.full_visits(self.pass_index)

    def weights(self, indices: Tensor) -> Tensor:
        return torch.ones(indices.shape, dtype=torch.float32, device=indices.device)

    @property
    def batches(self) -> int:
        return self.schedule.full_batches(self.pass_index)

    def observe(self, visits: int) -> None:
        """Count visits that a host makes by its own sampler, and book its passes."""
        visited = self.visited + visits
        while not self.finished and visited >= (whole := self.schedule.full_visits(self.pass_index)):
            self.visited = whole
            self.finish_pass()
            visited -= whole
        self.visited = visited

    def _worth(self) -> Worth | None:
        return self.full_worth

    def _visits_at(self, done: int, of: int) -> int:
        full = self.schedule.full_visits(self.pass_index)
        return min(full, full * done // of)
