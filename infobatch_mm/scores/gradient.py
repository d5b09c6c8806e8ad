"""The norm of a sample's gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..core.distributed import Group
from ..core.score_rule import Columns, ScoreRule, register_score
from .ema import average

#: What norms can be of.
_SOURCES = {
    "layer": "gradients of the last layer's weights",
    "outputs": "gradients at the outputs",
    "losses": "losses alone",
}


@register_score
class GradientScore(ScoreRule):
    """The norm of the gradient that a sample sends into the weights of the model's last layer.

    It comes from quantities that the backward pass computes anyway (:mod:`.core.sample_norms`), and follows the norm of
    the whole gradient (Katharopoulos and Fleuret, ICML 2018, stop one step earlier: at the layer's output). Where no
    last layer is known it is the norm of the gradient at the model's output; where only losses are, the loss.

    Args:
        layer (str, optional): Where a model of MMEngine has that layer, such as ``'decode_head.conv_seg'``; loops name
            it by ``observe()``. Defaults to where the hosts' own models have it.
        score_ema (float): Decay of a root mean square over the sample's visits, in [0, 1); 0 for the last norm alone.
            Defaults to 0.
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.
    """

    name = "gradient"
    takes_norms = True
    state_version = 4

    def __init__(self, layer: str | None = None, score_ema: float = 0.0, group: Group = None) -> None:
        super().__init__(group)
        if layer is not None and not isinstance(layer, str):
            raise ValueError(f"layer={layer!r}: give the place of the last layer in the model as text, like 'head.fc'")
        self.layer = layer
        self.score_ema = float(score_ema)
        self.overwrites = not score_ema

        self._source = ""

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **({} if self.layer is None else {"layer": self.layer})}

    def take_source(self, source: str) -> None:
        """Learn what norms are of, ``'layer'``, ``'outputs'`` or ``'losses'``.

        Raises:
            ValueError: If they were of something else so far: scores would be of two kinds.
        """
        if self._source not in ("", source):
            raise ValueError(
                f"score='gradient' went by the {_SOURCES[self._source]} so far, and would go by the "
                f"{_SOURCES[source]} now: give weigh() the same in every step, or begin a new run"
            )
        self._source = source

    def state_dict(self) -> dict[str, Any]:
        return {"gradient_source": self._source}

    @classmethod
    def damaged(cls, state: Mapping[str, Any], num_samples: int) -> str | None:
        return None if state.get("gradient_source") in ("", *_SOURCES) else "gradient_source"

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._source = state["gradient_source"]

    def fold(self, columns: Columns, where: np.ndarray, losses: np.ndarray) -> None:
        average(columns, where, losses, self.score_ema, squares=True)
