"""The views of a model itself: what tells one forward pass from the next, and that no loss is left unweighed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .dissect.coverage import Coverage
from .dissect.results import losses_in
from .norms import expect_norms
from .view import LossView
from .weigher import LossWeigher

#: ``labelled(model, data_samples)``: which samples have a label, shape ``(B,)``, bool, or None where nobody knows.
LabelledOf = Callable[[nn.Module, Sequence[Any]], Tensor | None]


class ModelView(LossView):
    """Stands in for a model's ``loss``: counts each call in training as one forward pass.

    Args:
        coverage (Coverage): Checks the losses that the model returns.
        labelled (Callable, optional): See :data:`LabelledOf`; samples without a label are not scored. Defaults to all.
    """

    def __init__(
        self,
        owner: nn.Module,
        weigher: LossWeigher,
        coverage: Coverage,
        labelled: LabelledOf | None = None,
    ) -> None:
        super().__init__(owner, "loss", weigher, scored=False)
        self._coverage = coverage
        self._labelled = labelled

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        if not self.owner.training:  # somebody evaluates another batch between our steps
            with self.weigher.suspended():
                return self.host(*args, **kwargs)
        batch = self.weigher.batch
        batch.restart()
        batch.reached = True
        for value in (*args, *kwargs.values()):
            if isinstance(value, (list, tuple)) and len(value) == batch.size:
                batch.rows.data_samples = value
                if self._labelled is not None:
                    batch.labelled = self._labelled(self.owner, value)
        losses = self.host(*args, **kwargs)
        self._coverage.check(dict(losses_in(losses)), batch.pruned)
        expect_norms(self.weigher, losses)
        return losses


class ParsedLossesView(LossView):
    """Stands in for a model's ``parse_losses``: checks that neither its losses nor their total hold an unweighted term.

    Args:
        coverage (Coverage): Checks the losses.
    """

    def __init__(self, owner: nn.Module, weigher: LossWeigher, coverage: Coverage) -> None:
        super().__init__(owner, "parse_losses", weigher, scored=False)
        self._coverage = coverage

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        if not self.owner.training:  # somebody evaluates another batch, or trains on the host's losses, see end()
            result = self.host(*args, **kwargs)
            if any(loss.requires_grad for _, loss in losses_in(result)):
                self.weigher.batch.evaluated = type(self.owner).__name__
            return result
        for value in (*args, *kwargs.values()):
            self._coverage.check(dict(losses_in(value)), self.weigher.pruned, parsed=True)
        result = self.host(*args, **kwargs)
        total = result[0] if isinstance(result, tuple) else result
        if isinstance(total, Tensor):
            self._coverage.check({("the total of parse_losses",): total}, self.weigher.pruned, parsed=True)
        return result


def model_views(
    model: nn.Module,
    weigher: LossWeigher,
    labelled: LabelledOf | None = None,
) -> list[LossView]:
    """The views of a model itself, to be attached beside the views of its heads; see :class:`ModelView`."""
    coverage = Coverage(model)
    return [ModelView(model, weigher, coverage, labelled), ParsedLossesView(model, weigher, coverage)]
