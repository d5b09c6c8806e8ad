"""Learning rates of the steps of a loop that a user writes: of the batch that was weighed last."""

from __future__ import annotations

from typing import Any

from .lr_factor import LearningRateFactor
from .training import Training


class FollowedRates:
    """Multiplies the learning rates of a user's optimisers by what the batch weighed last asks for.

    Steps are not told apart by their pass: a loop may fetch a batch ahead, and weigh the last one of a pass when the
    next has begun.

    Args:
        training (Training): Whose policy may ask for it; otherwise nothing is followed.
        advice (str): How the user names an optimiser.
    """

    def __init__(self, training: Training, advice: str) -> None:
        self._training, self._advice = training, advice
        self._rates: LearningRateFactor | None = None
        self._factor = 1.0

    def follow(self, optimizer: Any) -> None:
        """Follow the steps of an optimiser.

        Raises:
            ValueError: If it has no learning rate.
        """
        if not self._training.scales_rates:
            return
        if self._rates is None:
            self._rates = LearningRateFactor([], self.lr_factor)
        self._rates.follow(optimizer)

    def weighed(self, factor: float) -> None:
        """A batch was weighed, and the steps that follow are its own.

        Args:
            factor (float): See :meth:`.Training.lr_factor`.

        Raises:
            ValueError: If learning rates are to follow the size of batches, and no optimiser is known.
        """
        if self._rates is None and self._training.scales_rates:
            raise ValueError(
                f"keep='steps' with lr_rule={self._training.policy.lr_rule!r} multiplies the learning rates of smaller "
                f"batches, and no optimizer is known: {self._advice}, or say lr_rule='none'"
            )
        self._factor = factor

    def training_over(self) -> None:
        """What is stepped from here on is the user's own."""
        self._factor = 1.0

    def lr_factor(self) -> float:
        """What the learning rate of a step is multiplied by."""
        return self._factor
