"""Views of losses that are sums over samples once their normaliser is held, but are evaluated on each sample alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.devices import moved
from .dissect.results import losses_in, replace_losses
from .samplewise import Call, SamplewiseView


class SeparableView(SamplewiseView):
    """Optimises the host's own evaluation, with the gradient of each sample's predictions multiplied by its weight.

    Args:
        mean_over_valid (bool): Whether the normaliser counts the valid elements of the batch, see
            :meth:`.LossWeigher.begin`. Defaults to False.
        args, kwargs: As :class:`SamplewiseView` takes them.
    """

    def __init__(self, *args: Any, mean_over_valid: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._mean_over_valid = mean_over_valid

    def _weighed(self, call: Call) -> Any:
        alone = None
        if self._wants_own_losses():
            with torch.no_grad():
                alone = self._evaluate_alone(call.batch)
        call.reset()
        result = self._evaluate_host(call.batch, mean_over_valid=self._mean_over_valid)
        own = {} if alone is None else self._per_sample(result, alone)
        self._score(own, call.valid)
        return replace_losses(result, self._shown(call, result, own))

    def _wants_own_losses(self) -> bool:
        """A pruned pass shows what the samples' own losses come to, whether they count in the score or not."""
        return self.scored or self.weigher.pruned

    def _shown(self, call: Call, result: Any, own: dict[tuple, Tensor]) -> dict[tuple, Tensor]:
        """Path of each loss whose value is changed, and the loss with the value to show."""
        shown = {}
        for path, loss in losses_in(result):
            losses = own.get(path)
            self._distrust(loss, losses)
            if losses is not None:
                if call.valid is not None:  # a sample without a valid pixel may be 0/0 alone
                    losses = torch.where(moved(call.valid, losses.device) | losses.isfinite(), losses, 0)
                shown[path] = self.weigher.show_by_own(loss, losses)
        return shown


class SharesView(SeparableView):
    """A separable loss whose value in pruned passes is shown by what each sample contributes to it.

    Own losses are other shares where a loss is normalised by what differs from sample to sample.

    Args:
        shares (Callable): ``shares(owner, arguments)`` gives what each sample contributes to the loss, shape ``(B,)``.
        args, kwargs: As :class:`SeparableView` takes them.
    """

    def __init__(self, *args: Any, shares: Callable[[nn.Module, dict], Tensor], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shares = shares

    def _wants_own_losses(self) -> bool:
        return self.scored

    def _shown(self, call: Call, result: Any, own: dict[tuple, Tensor]) -> dict[tuple, Tensor]:
        if not self.weigher.pruned:
            return super()._shown(call, result, own)
        with torch.no_grad():
            shares = self._shares(self.owner, dict(call.batch.arguments))
        shown = {}
        for path, loss in losses_in(result):
            self._distrust(loss, own.get(path, shares))
            shown[path] = self.weigher.show_by_contributions(loss, shares)
        return shown
