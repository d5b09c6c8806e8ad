"""Learning rates of a script's optimisers in passes of smaller batches."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType

from ..core.followed_rates import FollowedRates
from ..core.training import Training

#: Engines that step optimisers of their own, where no hook of torch's is called.
_ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class ScriptRates(FollowedRates):
    """Follows the optimisers that an accelerator has prepared by the first batch.

    Args:
        accelerator (Accelerator): The run's.
        training (Training): As for :class:`.FollowedRates`.

    Raises:
        ValueError: If an engine steps the optimisers itself.
    """

    def __init__(self, accelerator: Accelerator, training: Training) -> None:
        super().__init__(training, "give it to infobatch.prepare()")
        self._accelerator = accelerator
        if training.scales_rates and accelerator.distributed_type in _ENGINES:
            raise ValueError(
                f"{accelerator.distributed_type.value} steps the optimizer itself, so that the learning rates of "
                "smaller batches cannot be multiplied for a step: say lr_rule='none', or use keep='batch'"
            )

    def weighed(self, factor: float) -> None:
        if self._rates is None:
            for each in self._accelerator._optimizers:
                self.follow(each.optimizer)
        super().weighed(factor)
