"""What a host's object does with the model itself: watches its last layer, estimates its running statistics."""

from __future__ import annotations

from torch import nn

from .last_layer import LastLayer
from .recalibration import Recalibration
from .training import Training


class ModelAids:
    """Shared by :class:`.InfoBatch` and :class:`.AcceleratedInfoBatch`."""

    _layer: LastLayer | None = None
    _recalibration: Recalibration

    def _begin_model(self, training: Training) -> None:
        self._recalibration = Recalibration(training)

    def observe(self, layer: nn.Module) -> None:
        """Name the model's last layer, for ``score='gradient'``: samples are scored by the gradient of its weights.

        Args:
            layer (nn.Module): An ``nn.Linear``, or a convolution without groups, that is called once for each batch in
                the forward pass. Takes the place of one that was named before.

        Raises:
            ValueError: If its gradient cannot be taken apart by sample.
        """
        if self._layer is not None:
            self._layer.remove()
        self._layer = LastLayer(layer)
