"""What :class:`.AcceleratedInfoBatch` does with the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader

from ..core.model import ModelAids
from .loader import LoaderGeometry


class ScriptModel(ModelAids):
    """The model of a script."""

    _accelerator: Accelerator
    _dataloader: DataLoader
    _geometry: LoaderGeometry

    def recalibrate(self, model: nn.Module, forward: Callable[[Any], object] | None = None) -> int:
        """Estimate the running statistics of batch normalisation on uniform batches, before an evaluation.

        Pruned batches are a biased sample, and so are the running statistics that they leave. Every process must call
        it, with the model in training mode; random generators are put back.

        Args:
            model (nn.Module): The model, as :meth:`prepare` returned it.
            forward (Callable, optional): Runs the model on a batch as the loader gives it, on the accelerator's device.
                Defaults to calling the model with it.

        Returns:
            int: Number of layers; 0 where there are none, or the statistics are of full passes.
        """

        def read(batches: list[list[int]]) -> Iterator[Any]:
            loader = self._dataloader
            for batch in batches:
                items = [loader.dataset[index] for index in batch]
                yield send_to_device(loader.collate_fn(items), self._accelerator.device)

        size = max(1, self._geometry.batch_size // self._accelerator.num_processes)
        return self._recalibration.run(model, read, forward or model, size)
