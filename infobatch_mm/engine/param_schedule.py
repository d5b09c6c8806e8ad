"""Learning rates by progress: the host's schedulers, stepped when the unpruned run would have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmengine.hooks import ParamSchedulerHook

from .process_state import optim_wrappers


class SchedulerPacer:
    """Makes each ``ParamSchedulerHook`` of a run step as often as the progress asks for.

    In a pruned pass the schedulers of the host must take the steps of a whole pass in fewer iterations,
    so some iterations step several times; an iteration loop's remainder can make one step not at all. The
    schedulers themselves are untouched, whatever their kind, and so is their saved state.

    Args:
        runner (Runner): The runner, whose hooks are paced.
        due (Callable): Returns the number of steps that should have been taken by now.

    Attributes:
        taken (int): Steps taken so far.
    """

    def __init__(self, runner: Any, due: Callable[[], int]) -> None:
        self.taken = 0
        self._due = due
        self._iter: int | None = None
        self._steps = 0
        self._hooks = [hook for hook in runner.hooks if isinstance(hook, ParamSchedulerHook)]
        for hook in self._hooks:
            hook.after_train_iter = self._paced(hook.after_train_iter)  # type: ignore[method-assign]

    def _paced(self, step: Callable[..., None]) -> Callable[..., None]:
        def after_train_iter(runner: Any, **kwargs: Any) -> None:
            # Several scheduler hooks share the count of one iteration.
            if self._iter != runner.iter:
                self._iter, self._steps = runner.iter, self._steps_due()
            for _ in range(self._steps):
                step(runner, **kwargs)

        return after_train_iter

    def _steps_due(self) -> int:
        steps = max(0, self._due() - self.taken)
        self.taken += steps
        return steps

    def restore(self) -> None:
        """Give the hooks their own method back."""
        for hook in self._hooks:
            del hook.after_train_iter


def renew_max_iters(runner: Any, max_iters: int) -> None:
    """Tell the loop, the log and the optimiser wrappers how many iterations the run will have.

    The wrappers keep copies by which they recognise the last iteration of a gradient accumulation: too low
    a number stops the training by an assertion, too high a one loses the last gradients.
    """
    runner.train_loop._max_iters = max_iters
    runner.message_hub.update_info("max_iters", max_iters)
    for single in optim_wrappers(runner):
        single._max_counts = max_iters
        single._remainder_counts = max_iters % single._accumulative_counts
