"""What :class:`.InfoBatch` does with the model itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..core.model import ModelAids
from .loader import PassLoader


class LoopModel(ModelAids):
    """The model of a loop."""

    def recalibrate(self, model: nn.Module, loader: PassLoader, forward: Callable[[Any], object] | None = None) -> int:
        """Estimate the running statistics of batch normalisation on uniform batches, before an evaluation.

        Pruned batches are a biased sample, and so are the running statistics that they leave. Every process must call
        it, with the model in training mode; random generators are put back.

        Args:
            model (nn.Module): The model.
            loader (PassLoader): What :meth:`loader` gave: its data set is read, in this process.
            forward (Callable, optional): Runs the model on a batch as the loader gives it, without the index. Defaults
                to calling the model with it.

        Returns:
            int: Number of layers; 0 where there are none, or the statistics are of full passes.
        """
        return self._recalibration.run(model, loader.read, forward or model, loader.batch_size)
